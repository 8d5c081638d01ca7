"""The project's own policy: it learns how long spot lasts, and plans with what that leaves."""

import math
from collections.abc import Sequence
from itertools import pairwise

from launch.simulation.planner import Model, Plan, make_plan
from launch.simulation.policies import can_risk, on_demand
from launch.simulation.simulate import Place, Terms, View

# Prior rates per hour by age, pooled over nine zones in February 2023. What has lasted, lasts:
# both spot and its outages are the safer the older they are.
AGES_H = (0.0, 0.5, 2.0, 8.0)
LEAVE_PER_H = (1.2, 0.55, 0.18, 0.06)
COME_PER_H = (1.33, 0.57, 0.28, 0.12)
PRIOR_EVENTS = 4.0  # how many events of its own weigh as much as the prior
STEP = 1.3  # to which learnt rates are rounded, so that plans are used again
MAX_CELLS = 1200  # of time in a plan; more ticks than that are taken several at a time
UNKNOWN_AGE_H = (0.5, 2.0)  # of spot, and of an outage, whose beginning was not seen


class Rate:
    """How often something happens in a tick, by age: the prior times a learnt factor.

    The factor is the mean of its Gamma posterior, which counts what happened and what was expected.
    """

    def __init__(self, per_h: Sequence[float], gap_h: float) -> None:
        self._prior = [rate * gap_h for rate in per_h]
        self._happened = self._expected = PRIOR_EVENTS

    def watched(self, phase: int) -> None:
        """A tick of that age passed."""
        self._expected += self._prior[phase]

    def happened(self) -> None:
        """It happened."""
        self._happened += 1

    def per_tick(self, step: float | None = None) -> list[float]:
        """By phase of age; the factor rounded to a power of `step`."""
        factor = self._happened / self._expected
        if step is not None:
            factor = step ** round(math.log(factor, step))
        return [rate * factor for rate in self._prior]


class Beliefs:
    """What launches and losses have taught.

    Attributes:
        leave: How often spot is lost, by zone.
        leave_any: The same, of all zones together.
        come: How often spot comes back to any of the zones.
        replaced: Share of losses after which another zone had spot at once.
        age: Ticks for which the spot that the job is on has been there.
        outage: Ticks for which no zone has had any.
    """

    def __init__(self, terms: Terms) -> None:
        gap_h, num_zones = terms.gap_h, len(terms.regions)
        self.leave = [Rate(LEAVE_PER_H, gap_h) for _ in range(num_zones)]
        self.leave_any = Rate(LEAVE_PER_H, gap_h)
        self.come = Rate([rate * num_zones for rate in COME_PER_H], gap_h)
        self.age = self._unknown_age = round(UNKNOWN_AGE_H[0] / gap_h)
        self.outage = round(UNKNOWN_AGE_H[1] / gap_h)
        self._starts = [age_h / gap_h for age_h in AGES_H[1:]]
        self._replaced, self._losses = 2 * (1 - 0.5 ** (num_zones - 1)), 2.0
        self._down_at: dict[int, int] = {}  # tick at which each zone was last seen without
        self._tick = -1
        self._place: Place | None = None
        self._is_out = False

    @property
    def replaced(self) -> float:
        """See the class."""
        return self._replaced / self._losses

    def phase(self, age: int) -> int:
        """Of an age in ticks."""
        return sum(age >= start for start in self._starts)

    def see(self, view: View) -> None:
        """Learns from what became of the last tick's wishes."""
        self._tick += 1
        spot = view.place if view.place is not None and view.place.is_spot else None
        for place in view.refused:
            self._down_at[place.zone] = self._tick - 1
        if self._is_out and (spot is not None or view.refused):
            self._see_outage(came_back=spot is not None)
        elif spot is None:
            self._is_out = self._is_out or bool(view.refused)
            self.outage += 1
        if spot is not None and spot != self._place:
            since = self._tick - self._down_at.get(spot.zone, -self._unknown_age)
            self.age = min(since, self._unknown_age)
        lost = view.preempted
        if spot is not None or lost is not None:
            zone = spot.zone if spot is not None else lost.zone if lost is not None else 0
            for rate in (self.leave[zone], self.leave_any):
                rate.watched(self.phase(self.age))
                if lost is not None:
                    rate.happened()
            self.age += 1
        if lost is not None:
            self._down_at[lost.zone] = self._tick
            self._is_out, self.outage = True, 0
        self._place = spot

    def _see_outage(self, came_back: bool) -> None:
        if self.outage == 0:
            self._losses += 1
            self._replaced += came_back
        else:
            self.come.watched(self.phase(self.outage))
            if came_back:
                self.come.happened()
        self.outage += 1
        self._is_out = not came_back

    def lasts(self, zone: int, age: float, horizon: float) -> tuple[float, float]:
        """How long spot of an age stays, in ticks up to a horizon, and the chance of all of it."""
        ends = [*self._starts, math.inf]
        survives, expected = 1.0, 0.0
        for rate, end in zip(self.leave[zone].per_tick(), ends, strict=True):
            ticks = min(end - age, horizon)
            if ticks <= 1e-9:
                continue
            here = survives * math.exp(-rate * ticks)
            expected += (survives - here) / rate
            survives, age, horizon = here, age + ticks, horizon - ticks
        return expected, survives


class DeadlineAware:
    """Plans with what it has learnt; explained in ten lines.

    1. It learns, from its own launches and losses alone, how much more often than the prior spot is
       lost in each zone, and how soon it comes back after an outage; both by age.
    2. For a market of just these rates it works out the cheapest plan, by dynamic programming over
       time left and slack: when to wait rather than pay on-demand, when to give up on-demand for
       waiting, when spot is worth leaving on-demand for; and what a tick of slack is worth.
    3. It asks zones in the order of what an hour of progress costs there: price, a start, egress,
       the work that a preemption destroys, the slack of both; for as long as spot may last there.
    4. It leaves spot that runs only for spot that is cheaper by that measure.
    5. The safety net comes first: on-demand, once one more lost tick could make the job late.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._beliefs = Beliefs(terms)
        self._cell = math.ceil(terms.deadline / MAX_CELLS)  # ticks

    def decide(self, view: View) -> Sequence[Place]:
        """See the class."""
        self._beliefs.see(view)
        if not can_risk(self._terms, view):
            return [on_demand(self._terms, view)]
        least_usd_per_h = min(view.on_demand_usd_per_h)
        prices = enumerate(view.spot_usd_per_h)
        zones = [zone for zone, usd_per_h in prices if usd_per_h < least_usd_per_h]
        place = view.place
        if place is not None and place.is_spot:
            if zones == [place.zone]:
                return [place]
            if place.zone not in zones:
                place = None  # dearer than on-demand by now: whatever is better than nothing
        plan = self._plan(view, min((view.spot_usd_per_h[z] for z in zones), default=math.inf))
        time_left = view.time_left // self._cell
        slack = (view.time_left - view.work_left - view.warming) // self._cell
        slack_usd = plan.slack_price(time_left, slack) * least_usd_per_h
        costs = {zone: self._usd_per_tick(view, zone, slack_usd) for zone in zones}
        spots = [Place(zone, True) for zone in sorted(zones, key=lambda zone: costs[zone])]
        if place is not None and place.is_spot:
            return spots[: spots.index(place) + 1]
        at = time_left, self._beliefs.phase(self._beliefs.outage), slack
        if place is None:
            return spots if plan.wait(*at) else [*spots, on_demand(self._terms, view)]
        stay = [] if plan.pause(*at) else [place]
        return [*spots, *stay] if plan.take(*at) else stay

    def _usd_per_tick(self, view: View, zone: int, slack_usd: float) -> float:
        """What a tick of progress costs in a zone, per node-hour (the scale does not matter)."""
        terms, usd_per_h = self._terms, view.spot_usd_per_h[zone]
        is_here = view.place == (zone, True)
        start = view.warming if is_here else terms.restart
        age = self._beliefs.age if is_here else round(UNKNOWN_AGE_H[0] / terms.gap_h)
        lasts, survives = self._beliefs.lasts(zone, age, view.work_left + start)
        lost = start + (1 - survives) * (terms.interval - 1) / 2
        moves = view.data_region not in (None, terms.regions[zone])
        egress = terms.egress_usd / (terms.gap_h * terms.gang_size) if moves else 0.0
        return (usd_per_h * lasts + slack_usd * lost + egress) / max(lasts - lost, 1e-3)

    def _plan(self, view: View, usd_per_h: float) -> Plan:
        terms, beliefs, cell = self._terms, self._beliefs, self._cell
        price = min(usd_per_h / max(min(view.on_demand_usd_per_h), 1e-9), 1.0)
        return make_plan(
            Model(
                deadline=terms.deadline // cell,
                slack=(terms.deadline - terms.work) // cell,
                restart=math.ceil(terms.restart / cell),
                interval=math.ceil(terms.interval / cell),
                price=round(price, 2),
                widths=tuple(
                    (b - a) / (terms.gap_h * cell) for a, b in pairwise((*AGES_H, math.inf))
                ),
                leave=_chances(beliefs.leave_any.per_tick(STEP), cell),
                come=_chances(beliefs.come.per_tick(STEP), cell),
                replaced=round(beliefs.replaced, 1),
            )
        )


def _chances(rates: Sequence[float], ticks: int) -> tuple[float, ...]:
    return tuple(1 - math.exp(-rate * ticks) for rate in rates)
