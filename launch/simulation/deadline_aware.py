"""The project's own policy: it learns how long spot lasts, and plans with what that leaves."""

import math
from collections.abc import Sequence
from itertools import pairwise

from launch.simulation.beliefs import AGES_H, STEP, UNKNOWN_AGE_H, Beliefs
from launch.simulation.planner import Model, Plan, make_plan
from launch.simulation.policies import can_risk, on_demand
from launch.simulation.simulate import Place, Terms, View

MAX_CELLS = 1200  # of time in a plan; more ticks than that are taken several at a time
CHANGE_STEP = 2.0  # to which the learnt rate of price changes is rounded
PRICE_STEP = 0.05  # of the on-demand price, to which prices are rounded


class DeadlineAware:
    """Plans with what it has learnt; explained in ten lines.

    1. It learns, from its own launches and losses alone, how much more often than the prior spot is
       lost in each zone, how soon it comes back, both by age, and how often which prices change.
    2. For a market of just these rates it works out the cheapest plan, by dynamic programming over
       time left and slack: when to wait rather than pay on-demand, when to give up on-demand for
       waiting, when spot is worth leaving on-demand for; and what a tick of slack is worth.
    3. It makes one such plan for each choice of zones to be content with, from "none at today's
       prices" to all: to wait for a low price, or at home, is worth it where its plan costs less.
    4. It asks zones in the order of what an hour of progress costs there: price, a start, egress,
       the work that a preemption destroys, the slack of both; for as long as spot may last there.
    5. It leaves spot that runs only for spot that is cheaper by that measure. Before on-demand it
       asks all zones; and the safety net comes first, once one more lost tick could make it late.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._beliefs = Beliefs(terms)
        self._cell = math.ceil(terms.deadline / MAX_CELLS)  # ticks
        self._slack_usd = 0.0  # what a tick of slack is worth, per node-hour

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
        costs = {zone: self._usd_per_tick(view, zone, self._slack_usd) for zone in zones}
        zones.sort(key=lambda zone: costs[zone])
        chosen, plan = self._choose(view, zones)
        time_left, _, slack = at = self._at(view)
        self._slack_usd = plan.slack_price(time_left, slack) * least_usd_per_h
        spots = [Place(zone, True) for zone in chosen]
        every_spot = [Place(zone, True) for zone in zones]
        if place is not None and place.is_spot:
            return every_spot[: every_spot.index(place) + 1]
        if place is None:
            return spots if plan.wait(*at) else [*every_spot, on_demand(self._terms, view)]
        if plan.pause(*at):
            return spots
        return [*every_spot, place] if plan.take(*at) else [place]

    def _at(self, view: View) -> tuple[int, int, int]:
        """Where in a plan the job is: time left, phase of the outage, slack."""
        slack = view.time_left - view.work_left - view.warming
        phase = self._beliefs.phase(self._beliefs.outage)
        return view.time_left // self._cell, phase, slack // self._cell

    def _choose(self, view: View, zones: Sequence[int]) -> tuple[Sequence[int], Plan]:
        """The zones to be content with, of those given (the best first), and the plan for them."""
        groups: dict[tuple[int, bool], list[int]] = {}  # alike: nothing is to be had by choosing
        for zone in zones:
            price = round(view.spot_usd_per_h[zone] / min(view.on_demand_usd_per_h) / PRICE_STEP)
            groups.setdefault((price, self._moves(view, zone)), []).append(zone)
        choices = [list[int]()]
        for group in groups.values():
            choices.append([*choices[-1], *group])
        if groups and len(set(self._beliefs.prices)) == 1:
            choices = choices[1:]  # no other price was ever seen to wait for
        plans = [make_plan(self._model(view, choice)) for choice in choices]
        costs = []
        for choice, plan in zip(choices, plans, strict=True):
            chance = 1 - math.prod(1 - self._beliefs.chance(zone) for zone in choice)
            costs.append(plan.cost(*self._at(view), chance))
        best = costs.index(min(costs))
        return choices[best], plans[best]

    def _moves(self, view: View, zone: int) -> bool:
        return view.data_region not in (None, self._terms.regions[zone])

    def _usd_per_tick(self, view: View, zone: int, slack_usd: float) -> float:
        """What a tick of progress costs in a zone, per node-hour (the scale does not matter)."""
        terms, usd_per_h = self._terms, view.spot_usd_per_h[zone]
        is_here = view.place == (zone, True)
        start = view.warming if is_here else terms.restart
        age = self._beliefs.age if is_here else round(UNKNOWN_AGE_H[0] / terms.gap_h)
        lasts, survives = self._beliefs.lasts(zone, age, view.work_left + start)
        lost = start + (1 - survives) * (terms.interval - 1) / 2
        egress = terms.egress_usd / (terms.gap_h * terms.gang_size)
        egress = egress if self._moves(view, zone) else 0.0
        return (usd_per_h * lasts + slack_usd * lost + egress) / max(lasts - lost, 1e-3)

    def _model(self, view: View, zones: Sequence[int]) -> Model:
        """Of the market that is left if only these zones will do, or others at no higher price.

        Today's prices hold for a while; by and by they become like those that were seen.
        """
        terms, beliefs, cell = self._terms, self._beliefs, self._cell
        num_zones, seen = len(terms.regions), sorted(beliefs.prices)
        usd = max(min(view.on_demand_usd_per_h), 1e-9)
        now = [min(view.spot_usd_per_h[zone] / usd, 1.0) for zone in zones]
        limit = max(now, default=seen[len(seen) // 3])  # without a zone: one of the lower prices
        later = [price for price in seen if price <= limit + 1e-9]
        share = len(later) / len(seen)
        change = beliefs.change.per_tick(CHANGE_STEP)[0]
        holds = (1 - math.exp(-change * terms.deadline)) / (change * terms.deadline)  # mean share
        if len(set(seen)) == 1:
            holds = 1.0
        weights = holds * len(now), (1 - holds) * share * num_zones  # in zones
        price = (
            weights[0] * math.fsum(now) / max(len(now), 1)
            + weights[1] * math.fsum(later) / max(len(later), 1)
        ) / max(math.fsum(weights), 1e-9)
        count = round(2 * math.fsum(weights)) / 2
        if zones:
            come = [rate * count for rate in beliefs.come.per_tick(STEP)]
        else:
            come = [change * share * num_zones * beliefs.up for _ in AGES_H]
        none = 1 - beliefs.up
        replaced = 1 - none ** max(count - 1, 0)
        regions = [terms.regions[zone] for zone in zones or range(num_zones)]
        shares = [regions.count(region) / len(regions) for region in dict.fromkeys(regions)]
        home = math.fsum(share**2 for share in shares)
        stays = min(replaced, 1 - none ** max(count * home - 1, 0)) + (1 - replaced) * home
        egress = terms.egress_usd / (terms.gap_h * terms.gang_size * usd * cell)  # on-demand cells
        return Model(
            deadline=terms.deadline // cell,
            slack=(terms.deadline - terms.work) // cell,
            restart=math.ceil(terms.restart / cell),
            interval=math.ceil(terms.interval / cell),
            price=round(round(price / PRICE_STEP) * PRICE_STEP, 2),
            move=round((1 - stays) * egress),
            widths=tuple((b - a) / (terms.gap_h * cell) for a, b in pairwise((*AGES_H, math.inf))),
            leave=_chances(
                [rate + change * (1 - share) for rate in beliefs.leave_any.per_tick(STEP)], cell
            ),
            come=_chances(come, cell),
            replaced=round(replaced, 1),
        )


def _chances(rates: Sequence[float], ticks: int) -> tuple[float, ...]:
    return tuple(1 - math.exp(-rate * ticks) for rate in rates)
