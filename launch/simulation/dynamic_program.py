"""The optimal plan for a market of known rates: when to wait for spot and when to pay on-demand."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]  # single precision is far beyond that of the rates

_COARSE = 8  # costs are kept for every eighth time left and slack only, to save memory
_NEVER = 1e9  # cost of the impossible in on-demand ticks; the difference of infinities would be NaN


@dataclass(frozen=True)
class Model:
    """A job on a market whose spot comes and goes at random, with rates that depend on its age.

    There are K phases of age. Durations are in ticks.

    Attributes:
        deadline: Ticks for the whole job.
        slack: Ticks of the deadline in which the job need not compute.
        restart: Ticks of a start.
        interval: Ticks of progress between two checkpoints.
        price: Spot price as a share of the on-demand price.
        move: Cost of a start on spot besides its ticks (e.g. egress), in on-demand ticks.
        widths: Length of each phase of age (K); the last one is not used.
        leave: Probability in a tick that spot is lost, by its age (K).
        come: Probability in a tick that spot comes back, by the age of the outage (K).
        replaced: Probability that other spot replaces lost spot at once.
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
    """A decision by time left, phase of the outage and slack, as a table of bits.

    A threshold of slack would not do: slack that does not suffice for one more move and return is
    worth nothing, so that the decision is not monotonic.
    """

    def __init__(self, model: Model) -> None:
        shape = (model.deadline + 1, len(model.widths), model.slack // 8 + 1)
        self._bits = np.zeros(shape, np.uint8)

    def set(self, time_left: int, is_worth: npt.NDArray[np.bool_]) -> None:
        """Stores the decision at a time left, for all phases and slacks (K, S)."""
        self._bits[time_left] = np.packbits(is_worth, axis=1)

    def __call__(self, time_left: int, phase: int, slack: int) -> bool:
        """Returns the decision in one state."""
        return bool(self._bits[time_left, phase, slack // 8] >> (7 - slack % 8) & 1)


@dataclass(frozen=True)
class Plan:
    """The optimal decisions of a job, and its expected costs, in on-demand ticks.

    Attributes:
        wait: True if a job without nodes should wait for spot instead of starting on-demand.
        pause: True if a job on on-demand nodes should give them up and wait for spot.
        take: True if a job on on-demand nodes should move to available spot.
        costs: Cost of the rest from spot that has just started, by every eighth time left and
            slack.
        takes: Cost of the rest from a start on spot, with the same axes.
        idles: Cost of the rest without nodes, also by phase of the outage.
    """

    wait: Decision
    pause: Decision
    take: Decision
    costs: Floats
    takes: Floats
    idles: Floats

    def cost(self, time_left: int, phase: int, slack: int, chance: float) -> float:
        """Returns the expected cost of the rest without nodes, in on-demand ticks.

        Args:
            time_left: Ticks until the deadline.
            phase: Phase of the outage.
            slack: Ticks of slack.
            chance: Probability that spot is available now.
        """
        at = time_left // _COARSE, min(slack // _COARSE, self.takes.shape[1] - 1)
        return float(chance * self.takes[at] + (1 - chance) * self.idles[at[0], phase, at[1]])

    def slack_price(self, time_left: int, slack: int) -> float:
        """Returns what one more tick of slack saves in a state, in on-demand ticks."""
        costs = self.costs[time_left // _COARSE]
        left = min(slack // _COARSE, len(costs) - 2)
        return float(costs[left] - costs[left + 1]) / _COARSE if left >= 0 else 0.0


@lru_cache(maxsize=256)
def make_plan(model: Model) -> Plan:
    """Computes the plan of least expected cost, by dynamic programming over time left and slack.

    States: on spot, with its age and the unsaved ticks of progress; on on-demand nodes or without
    nodes, with the age of the outage. Shapes: K phases of age, U unsaved ticks, S ticks of slack.
    Costs are in on-demand ticks. Missing the deadline costs more than anything else.
    """
    num_phases, num_slacks = len(model.widths), model.slack + 1
    slack = np.arange(num_slacks)
    leave = np.array(model.leave, np.float32)[:, None, None]
    come = np.array(model.come, np.float32)[:, None]
    older = [min(1.0, 1 / width) for width in model.widths[:-1]]

    def aged(value: Floats) -> Floats:
        """Returns the expected value a tick later, when the phase may be one older (K, ...)."""
        # A phase of w ticks is left with probability 1/w in a tick, so that the state needs no
        # exact age.
        result = value.copy()
        for phase, chance in enumerate(older):
            result[phase] += chance * (value[phase + 1] - value[phase])
        return result

    def less(value: Floats, ticks: int) -> Floats:
        """Returns the value with `ticks` less slack (..., S)."""
        if ticks == 0:
            return value
        result = np.full_like(value, _NEVER)
        result[..., ticks:] = value[..., : max(0, num_slacks - ticks)]
        return result

    restart = model.restart
    unsaved = (np.arange(model.interval) + 1) % model.interval  # after one more tick (U)
    left_if_lost = slack - unsaved[:, None]  # slack after a loss (U, S)
    is_spot_safe = left_if_lost > restart  # otherwise the safety net goes on-demand
    left_if_lost = np.maximum(left_if_lost, 0)
    costs = np.zeros((model.deadline // _COARSE + 1, model.slack // _COARSE + 1), np.float32)
    idle_costs = np.zeros((len(costs), num_phases, costs.shape[1]), np.float32)
    decisions = Decision(model), Decision(model), Decision(model)
    plan = Plan(*decisions, costs, np.zeros_like(costs), idle_costs)
    done = np.zeros((num_phases, num_slacks), np.float32)
    # Values for the last `restart` times left, the nearest first: a start skips that many ticks.
    # With no time left the job is done, at no cost.
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
        # As much slack as time left means that no work is left.
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
