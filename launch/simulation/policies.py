"""Policies that place a job on spot and on-demand nodes: the simple ones and the published ones."""

from collections.abc import Sequence

from launch.simulation.simulate import Place, Terms, View


def can_risk(terms: Terms, view: View) -> bool:
    """Whether this tick can be lost, with all that is not saved, and on-demand still be in time.

    The safety net of Can't Be Late (Wu et al., NSDI 2024) in whole ticks. A policy that goes
    on-demand as soon as this is False, and stays there for as long as it is, is never late.
    """
    return view.left_if_lost == 0 or view.time_left - 1 >= terms.restart + view.left_if_lost


def on_demand(terms: Terms, view: View) -> Place:
    """Where on-demand nodes are cheapest for the rest of the job, egress and a move included."""
    hours = (view.work_left + terms.restart) * terms.gap_h * terms.gang_size

    def cost_usd(zone: int) -> tuple[float, int]:
        is_here = view.place == (zone, False)
        moves = view.data_region not in (None, terms.regions[zone])
        restart = 0 if is_here else 1
        usd = view.on_demand_usd_per_h[zone] * hours + moves * terms.egress_usd
        return usd + restart * 1e-9, zone

    if view.place is not None and not view.place.is_spot:
        return view.place
    return Place(min(range(len(terms.regions)), key=cost_usd), False)


def by_price(view: View) -> list[Place]:
    """Spot of all zones, the cheapest first."""
    prices = view.spot_usd_per_h
    return [Place(zone, True) for zone in sorted(range(len(prices)), key=lambda z: prices[z])]


class OnDemand:
    """On-demand nodes from beginning to end."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms

    def decide(self, view: View) -> Sequence[Place]:
        """The same place always."""
        return [on_demand(self._terms, view)]


class SpotOnly:
    """Spot nodes of the zone that was cheapest at the beginning, or none; it knows no deadline."""

    def __init__(self, terms: Terms) -> None:
        self._place: Place | None = None

    def decide(self, view: View) -> Sequence[Place]:
        """The same place always."""
        if self._place is None:
            self._place = by_price(view)[0]
        return [self._place]


class Failover:
    """SkyPilot's FAILOVER: the lost place again, then the others by price; it knows no deadline."""

    def __init__(self, terms: Terms) -> None:
        self._last: Place | None = None

    def decide(self, view: View) -> Sequence[Place]:
        """Stays; after a loss the lost place comes first."""
        self._last = view.place or view.preempted or self._last
        first = [self._last] if self._last is not None else []
        return [*first, *(place for place in by_price(view) if place != self._last)]


class Eager:
    """SkyPilot's EAGER_NEXT_REGION: other regions first, by price; it knows no deadline."""

    def __init__(self, terms: Terms) -> None:
        self._regions = terms.regions
        self._lost: Place | None = None

    def decide(self, view: View) -> Sequence[Place]:
        """Stays; after a loss the lost region comes last."""
        if view.place is not None:
            return [view.place]
        self._lost = view.preempted or self._lost
        if self._lost is None:
            return by_price(view)
        region = self._regions[self._lost.zone]
        return sorted(by_price(view), key=lambda place: self._regions[place.zone] == region)


class Greedy:
    """Spot wherever it is cheapest, waiting where there is none, until the safety net."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._is_late = False

    def decide(self, view: View) -> Sequence[Place]:
        """Stays on spot while it lasts; on on-demand to the end."""
        self._is_late = self._is_late or not can_risk(self._terms, view)
        if self._is_late:
            return [on_demand(self._terms, view)]
        return [view.place] if view.place is not None else by_price(view)


class UniformProgress:
    """Uniform Progress (Can't Be Late, Wu et al., NSDI 2024): as far as the clock, at least.

    Spot is used wherever there is some (by price), and kept while it lasts. Without spot the job
    goes on-demand when it is behind `work * elapsed / deadline`, and waits otherwise. Hysteresis:
    once on-demand it waits no more until it is where it should be two starts later. The safety net
    holds to the end.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._is_late = False

    def _is_ahead(self, view: View, margin: int) -> bool:
        terms = self._terms
        elapsed = terms.deadline - view.time_left + margin
        return (terms.work - view.work_left) * terms.deadline >= terms.work * elapsed

    def decide(self, view: View) -> Sequence[Place]:
        """See the class."""
        self._is_late = self._is_late or not can_risk(self._terms, view)
        if self._is_late:
            return [on_demand(self._terms, view)]
        if view.place is not None and view.place.is_spot:
            return [view.place]
        margin = 2 * self._terms.restart if view.place is not None else 0
        if self._is_ahead(view, margin):
            return by_price(view)
        return [*by_price(view), on_demand(self._terms, view)]
