"""Simple and published policies for placing a job on spot and on-demand nodes."""

from collections.abc import Sequence

from launch.simulation.simulate import Place, Terms, View


def can_risk(terms: Terms, view: View) -> bool:
    """Returns whether the job can lose this tick and all unsaved work, and still be in time.

    This is the safety net of Can't Be Late (Wu et al., NSDI 2024) in whole ticks. A policy that
    goes on-demand as soon as it is False, and stays there while it is, is never late.
    """
    return view.left_if_lost == 0 or view.time_left - 1 >= terms.restart + view.left_if_lost


def on_demand(terms: Terms, view: View) -> Place:
    """Returns the place of the cheapest on-demand nodes for the rest of the job, with egress."""
    hours = (view.work_left + terms.restart) * terms.gap_h * terms.gang_size

    def cost_usd(zone: int) -> tuple[float, int]:
        is_here = view.place == (zone, False)
        moves = view.data_region not in (None, terms.regions[zone])
        restart = 0 if is_here else 1
        usd = view.on_demand_usd_per_h[zone] * hours + moves * terms.egress_usd
        # A tiny amount for a start keeps the job where it is between places of equal cost.
        return usd + restart * 1e-9, zone

    if view.place is not None and not view.place.is_spot:
        return view.place
    return Place(min(range(len(terms.regions)), key=cost_usd), False)


def by_price(view: View) -> list[Place]:
    """Returns the spot places of all zones, the cheapest first."""
    prices = view.spot_usd_per_h
    return [Place(zone, True) for zone in sorted(range(len(prices)), key=lambda z: prices[z])]


class OnDemand:
    """Uses on-demand nodes from beginning to end."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms

    def decide(self, view: View) -> Sequence[Place]:
        """Returns the on-demand place."""
        return [on_demand(self._terms, view)]


class SpotOnly:
    """Uses only spot nodes of the zone that is cheapest at the start; ignores the deadline."""

    def __init__(self, terms: Terms) -> None:
        self._place: Place | None = None

    def decide(self, view: View) -> Sequence[Place]:
        """Returns the place of the first decision."""
        if self._place is None:
            self._place = by_price(view)[0]
        return [self._place]


class Failover:
    """Imitates SkyPilot's FAILOVER: the lost place first, then by price; ignores the deadline."""

    def __init__(self, terms: Terms) -> None:
        self._last: Place | None = None

    def decide(self, view: View) -> Sequence[Place]:
        """Returns the current or lost place first, then the others by price."""
        self._last = view.place or view.preempted or self._last
        first = [self._last] if self._last is not None else []
        return [*first, *(place for place in by_price(view) if place != self._last)]


class Eager:
    """Imitates SkyPilot's EAGER_NEXT_REGION: other regions first; ignores the deadline."""

    def __init__(self, terms: Terms) -> None:
        self._regions = terms.regions
        self._lost: Place | None = None

    def decide(self, view: View) -> Sequence[Place]:
        """Returns the current place, or all places with the lost region last."""
        if view.place is not None:
            return [view.place]
        self._lost = view.preempted or self._lost
        if self._lost is None:
            return by_price(view)
        region = self._regions[self._lost.zone]
        # The sort is stable: within and outside of the lost region, the order is by price.
        return sorted(by_price(view), key=lambda place: self._regions[place.zone] == region)


class Greedy:
    """Uses the cheapest spot and waits without spot, until the safety net."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._is_late = False

    def decide(self, view: View) -> Sequence[Place]:
        """Returns the current spot or all spot places; on-demand once the job could be late."""
        self._is_late = self._is_late or not can_risk(self._terms, view)
        if self._is_late:
            return [on_demand(self._terms, view)]
        return [view.place] if view.place is not None else by_price(view)


class UniformProgress:
    """Follows Uniform Progress (Can't Be Late, Wu et al., NSDI 2024).

    Spot is used wherever it is available, by price, and kept while it lasts. Without spot the job
    goes on-demand when its progress is below `work * elapsed / deadline`, and waits otherwise.
    Hysteresis: on-demand nodes are kept until the progress is what it should be two starts later.
    Once the safety net takes over, the job stays on-demand to the end.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._is_late = False

    def _is_ahead(self, view: View, margin: int) -> bool:
        terms = self._terms
        elapsed = terms.deadline - view.time_left + margin
        return (terms.work - view.work_left) * terms.deadline >= terms.work * elapsed

    def decide(self, view: View) -> Sequence[Place]:
        """Returns the places to request, in order; see the class."""
        self._is_late = self._is_late or not can_risk(self._terms, view)
        if self._is_late:
            return [on_demand(self._terms, view)]
        if view.place is not None and view.place.is_spot:
            return [view.place]
        margin = 2 * self._terms.restart if view.place is not None else 0
        if self._is_ahead(view, margin):
            return by_price(view)
        return [*by_price(view), on_demand(self._terms, view)]
