"""The project's own policy: it learns how long spot lasts, and plans with those estimates."""

import math
from collections.abc import Sequence
from itertools import pairwise

from launch.simulation.availability import AGES_H, STEP, UNKNOWN_AGE_H, Beliefs
from launch.simulation.dynamic_program import Model, Plan, make_plan
from launch.simulation.policies import can_risk, on_demand
from launch.simulation.simulate import Place, Terms, View

MAX_CELLS = 1200  # most time steps of a plan; a step has several ticks if there are more
CHANGE_STEP = 2.0  # the learnt rate of price changes is rounded to powers of it
PRICE_STEP = 0.05  # prices are rounded to multiples of it, as shares of the on-demand price


class DeadlineAware:
    """Plans with learnt rates of the market, in five steps.

    1. It learns from its own launches and losses how often spot is lost in each zone and how soon
       it comes back, both by age and relative to a prior, and how often prices change.
    2. For a market with these rates it computes the cheapest plan by dynamic programming over time
       left and slack: when to wait for spot instead of paying on-demand, when to leave on-demand
       nodes to wait, when to leave them for spot, and the value of a tick of slack.
    3. It computes such a plan for each set of acceptable zones, from none at today's prices to all,
       and uses the cheapest: this decides whether to wait for a low price or for the home region.
    4. It requests zones in the order of the cost of an hour of progress: the price, a start,
       egress, the work lost to preemptions, and the slack that these use up.
    5. It leaves running spot only for spot that is cheaper by that measure. It requests all zones
       before on-demand nodes. The safety net overrides all this once one more lost tick could make
       the job late.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._beliefs = Beliefs(terms)
        self._cell = math.ceil(terms.deadline / MAX_CELLS)  # ticks
        self._slack_usd = 0.0  # what a tick of slack is worth, per node-hour

    def decide(self, view: View) -> Sequence[Place]:
        """Returns the places to request, in order; see the class."""
        self._beliefs.see(view)
        if not can_risk(self._terms, view):
            return [on_demand(self._terms, view)]
        least_usd_per_h = min(view.on_demand_usd_per_h)
        prices = enumerate(view.spot_usd_per_h)
        zones = [zone for zone, usd_per_h in prices if usd_per_h < least_usd_per_h]
        place = view.place
        if place is not None and place.is_spot:
            if zones == [place.zone]:  # no other zone to compare: planning is not needed
                return [place]
            if place.zone not in zones:
                place = None  # its price has risen above on-demand: treated as no place
        costs = {zone: self._usd_per_tick(view, zone, self._slack_usd) for zone in zones}
        zones.sort(key=lambda zone: costs[zone])
        chosen, plan = self._choose(view, zones)
        time_left, _, slack = at = self._at(view)
        self._slack_usd = plan.slack_price(time_left, slack) * least_usd_per_h
        spots = [Place(zone, True) for zone in chosen]
        every_spot = [Place(zone, True) for zone in zones]
        # Zones are sorted by cost: those before the current one are cheaper, so worth a move.
        if place is not None and place.is_spot:
            return every_spot[: every_spot.index(place) + 1]
        if place is None:
            return spots if plan.wait(*at) else [*every_spot, on_demand(self._terms, view)]
        if plan.pause(*at):
            return spots
        return [*every_spot, place] if plan.take(*at) else [place]

    def _at(self, view: View) -> tuple[int, int, int]:
        """Returns the state of the job in a plan: time left, phase of the outage, slack."""
        slack = view.time_left - view.work_left - view.warming
        phase = self._beliefs.phase(self._beliefs.outage)
        return view.time_left // self._cell, phase, slack // self._cell

    def _choose(self, view: View, zones: Sequence[int]) -> tuple[Sequence[int], Plan]:
        """Returns the acceptable zones among those given (best first), and the plan for them."""
        # Zones with equal price and egress are accepted together: excluding one gains nothing.
        groups: dict[tuple[int, bool], list[int]] = {}
        for zone in zones:
            price = round(view.spot_usd_per_h[zone] / min(view.on_demand_usd_per_h) / PRICE_STEP)
            groups.setdefault((price, self._moves(view, zone)), []).append(zone)
        choices = [list[int]()]
        for group in groups.values():
            choices.append([*choices[-1], *group])
        if groups and len(set(self._beliefs.prices)) == 1:
            choices = choices[1:]  # only one price was ever seen, so waiting for another is futile
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
        """Returns the cost of a tick of progress in a zone; only the order of zones matters."""
        terms, usd_per_h = self._terms, view.spot_usd_per_h[zone]
        is_here = view.place == (zone, True)
        start = view.warming if is_here else terms.restart
        age = self._beliefs.age if is_here else round(UNKNOWN_AGE_H[0] / terms.gap_h)
        lasts, survives = self._beliefs.lasts(zone, age, view.work_left + start)
        # A preemption destroys half a checkpoint interval on average.
        lost = start + (1 - survives) * (terms.interval - 1) / 2
        egress = terms.egress_usd / (terms.gap_h * terms.gang_size)
        egress = egress if self._moves(view, zone) else 0.0
        return (usd_per_h * lasts + slack_usd * lost + egress) / max(lasts - lost, 1e-3)

    def _model(self, view: View, zones: Sequence[int]) -> Model:
        """Returns the market of only these zones, and of others whose price falls to theirs.

        Today's prices hold for a while and then change to prices like those seen before.
        """
        terms, beliefs, cell = self._terms, self._beliefs, self._cell
        num_zones, seen = len(terms.regions), sorted(beliefs.prices)
        usd = max(min(view.on_demand_usd_per_h), 1e-9)
        now = [min(view.spot_usd_per_h[zone] / usd, 1.0) for zone in zones]
        limit = max(now, default=seen[len(seen) // 3])  # without a zone: the lower third of prices
        later = [price for price in seen if price <= limit + 1e-9]
        share = len(later) / len(seen)
        change = beliefs.change.per_tick(CHANGE_STEP)[0]
        holds = (1 - math.exp(-change * terms.deadline)) / (change * terms.deadline)  # mean share
        if len(set(seen)) == 1:
            holds = 1.0
        weights = holds * len(now), (1 - holds) * share * num_zones  # numbers of zones
        price = (
            weights[0] * math.fsum(now) / max(len(now), 1)
            + weights[1] * math.fsum(later) / max(len(later), 1)
        ) / max(math.fsum(weights), 1e-9)
        # Rounding here and below makes models repeat, so that `make_plan` finds them in its cache.
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
        # Egress in units of the plan: cells of on-demand time.
        egress = terms.egress_usd / (terms.gap_h * terms.gang_size * usd * cell)
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
