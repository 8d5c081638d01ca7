"""When to wait for spot, when to pay for on-demand: the best plan for a market of known rates."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]  # of a precision far beyond that of the rates

_COARSE = 8
_NEVER = 1e9  # on-demand ticks: no infinity, whose differences are no numbers


@dataclass(frozen=True)
class Model:
    """A job on a market whose spot comes and goes at random, at rates that depend on its age.

    K phases of age; durations in ticks.

    Attributes:
        deadline: Ticks for the whole job.
        slack: Of these, how many it needs not compute in.
        restart: Ticks of a start.
        interval: Ticks of progress between two checkpoints.
        price: Of spot, as a share of the on-demand price.
        move: Of what a start on spot costs beside its ticks (egress, say): in on-demand ticks.
        widths: How long each phase of age lasts (K); the last one's is not used.
        leave: Chance in a tick that spot is lost, by its age (K).
        come: Chance in a tick that spot comes back, by the age of the outage (K).
        replaced: Chance that other spot takes a lost one's place at once.
    """

    deadline: int
    slack: int
    restart: int
    interval: int
    price: float
    move: float
    widths: tuple[float, ...]
    leave: tuple[float, ...]
    come: tuple[float, ...]
    replaced: float


class Decision:
    """Whether something is worth it, by time left, phase of the outage and slack: a table of bits.

    No threshold would do: slack that is left over between two round trips is worth nothing.
    """

    def __init__(self, model: Model) -> None:
        shape = (model.deadline + 1, len(model.widths), model.slack // 8 + 1)
        self._bits = np.zeros(shape, np.uint8)

    def set(self, time_left: int, is_worth: npt.NDArray[np.bool_]) -> None:
        """Notes it for all phases and slacks (K, S)."""
        self._bits[time_left] = np.packbits(is_worth, axis=1)

    def __call__(self, time_left: int, phase: int, slack: int) -> bool:
        """Whether it is worth it there."""
        return bool(self._bits[time_left, phase, slack // 8] >> (7 - slack % 8) & 1)


@dataclass(frozen=True)
class Plan:
    """What to do while there is no spot, or to do with spot that has come.

    Attributes:
        wait: From nowhere: to wait for spot, rather than to start on-demand.
        pause: From on-demand: to wait for spot.
        take: From on-demand: to start on spot that can be had.
        costs: Of the rest, from spot just started; by every eighth time left and slack.
        takes: The same from a start on spot.
        idles: The same from nowhere; by age of the outage as well.
    """

    wait: Decision
    pause: Decision
    take: Decision
    costs: Floats
    takes: Floats
    idles: Floats

    def cost(self, time_left: int, phase: int, slack: int, chance: float) -> float:
        """Of the rest, from nowhere, if spot can be had now by that chance: in on-demand ticks."""
        at = time_left // _COARSE, min(slack // _COARSE, self.takes.shape[1] - 1)
        return float(chance * self.takes[at] + (1 - chance) * self.idles[at[0], phase, at[1]])

    def slack_price(self, time_left: int, slack: int) -> float:
        """What one more tick of slack saves there, in on-demand ticks."""
        costs = self.costs[time_left // _COARSE]
        left = min(slack // _COARSE, len(costs) - 2)
        return float(costs[left] - costs[left + 1]) / _COARSE if left >= 0 else 0.0


@lru_cache(maxsize=256)
def make_plan(model: Model) -> Plan:
    """The plan with the least expected cost, by dynamic programming over (time left, slack, state).

    States: on spot, with its age and the ticks of progress that are not saved; on on-demand nodes
    or nowhere, with the age of the outage. Shapes: K phases of age, U unsaved ticks, S of slack.
    Costs are in on-demand ticks. What cannot be in time costs more than all else.
    """
    num_phases, num_slacks = len(model.widths), model.slack + 1
    slack = np.arange(num_slacks)
    leave = np.array(model.leave, np.float32)[:, None, None]
    come = np.array(model.come, np.float32)[:, None]
    older = [min(1.0, 1 / width) for width in model.widths[:-1]]

    def aged(value: Floats) -> Floats:
        """Its expectation a tick later: by then it may be one phase older (K, ...)."""
        result = value.copy()
        for phase, chance in enumerate(older):
            result[phase] += chance * (value[phase + 1] - value[phase])
        return result

    def less(value: Floats, ticks: int) -> Floats:
        """The value with that much less slack (..., S)."""
        if ticks == 0:
            return value
        result = np.full_like(value, _NEVER)
        result[..., ticks:] = value[..., : max(0, num_slacks - ticks)]
        return result

    restart = model.restart
    unsaved = (np.arange(model.interval) + 1) % model.interval  # after one more tick (U)
    left_if_lost = slack - unsaved[:, None]  # slack (U, S)
    is_spot_safe = left_if_lost > restart  # else the safety net ends it
    left_if_lost = np.maximum(left_if_lost, 0)
    costs = np.zeros((model.deadline // _COARSE + 1, model.slack // _COARSE + 1), np.float32)
    idle_costs = np.zeros((len(costs), num_phases, costs.shape[1]), np.float32)
    decisions = Decision(model), Decision(model), Decision(model)
    plan = Plan(*decisions, costs, np.zeros_like(costs), idle_costs)
    done = np.zeros((num_phases, num_slacks), np.float32)
    # The values at the last `restart` times left, the nearest first; with no time left all is done.
    spots = [np.zeros((num_phases, model.interval, num_slacks), np.float32)]
    idles, on_demands, takes = [done], [done], [done[0]]
    for time_left in range(1, model.deadline + 1):
        wait = (1 - come) * less(aged(idles[0]), 1) + come * less(takes[0], 1)
        worked = aged(on_demands[0])
        work = 1 + (1 - come) * worked + come * np.minimum(worked, takes[0])
        if restart == 0:
            start = work
        elif time_left >= restart:
            start = restart + less(on_demands[restart - 1], restart)
        else:
            start = np.full_like(work, _NEVER)
        lost = model.replaced * takes[0] + (1 - model.replaced) * idles[0][0]
        stay = (1 - leave) * aged(spots[0])[:, unsaved] + leave * lost[left_if_lost]
        stay += model.price
        spot = np.where(is_spot_safe, np.minimum(stay, start[0]), start[0])
        idle = np.minimum(wait, start)
        on_demand = np.minimum(work, wait)
        if restart == 0:
            take = model.move + spot[0, 0]
        elif time_left >= restart:
            take = model.move + restart * model.price + less(spots[restart - 1][0, 0], restart)
        else:
            take = np.full(num_slacks, _NEVER, np.float32)
        take = np.minimum(take, start[0])
        for value in (spot, idle, on_demand, take):
            value[..., slack >= time_left] = 0.0
        plan.wait.set(time_left, wait <= start)
        plan.pause.set(time_left, wait < work)
        plan.take.set(time_left, take < work)
        if time_left % _COARSE == 0:
            costs[time_left // _COARSE] = spot[0, 0, ::_COARSE]
            plan.takes[time_left // _COARSE] = take[::_COARSE]
            plan.idles[time_left // _COARSE] = idle[:, ::_COARSE]
        keep = max(1, restart)
        spots, idles = [spot, *spots][:keep], [idle, *idles][:keep]
        on_demands, takes = [on_demand, *on_demands][:keep], [take, *takes][:keep]
    return plan
