"""Estimates of a spot market that a policy learns from the launches and losses of its own job."""

import math
from collections.abc import Sequence

from launch.simulation.simulate import Place, Terms, View

# Prior rates per hour by age, pooled over nine zones in February 2023. The rates fall with age:
# the longer spot or an outage has lasted, the longer it will last.
AGES_H = (0.0, 0.5, 2.0, 8.0)
LEAVE_PER_H = (1.2, 0.55, 0.18, 0.06)
COME_PER_H = (1.33, 0.57, 0.28, 0.12)
CHANGE_PER_H = (1 / 48,)  # price changes; too rare to wait for one before the first is seen
PRIOR_EVENTS = 4.0  # number of observed events that weigh as much as the prior
STEP = 1.3  # learnt rates are rounded to powers of it, so that cached plans are used again
UNKNOWN_AGE_H = (0.5, 2.0)  # assumed age of spot, and of an outage, whose start was not seen


class Rate:
    """The rate of an event in a tick, by age: the prior rate times a learnt factor.

    The factor has a Gamma prior; its posterior mean is the number of events that happened, divided
    by the number that the prior rate predicted.
    """

    def __init__(self, per_h: Sequence[float], gap_h: float, prior: float = PRIOR_EVENTS) -> None:
        self._prior = [rate * gap_h for rate in per_h]
        self._happened = self._expected = prior

    def watched(self, phase: int, times: int = 1) -> None:
        """Records that `times` ticks passed at an age of that phase."""
        self._expected += self._prior[phase] * times

    def happened(self, times: int = 1) -> None:
        """Records that the event happened `times` times."""
        self._happened += times

    def per_tick(self, step: float | None = None) -> list[float]:
        """Returns the rates by phase of age, with the factor rounded to a power of `step`."""
        factor = self._happened / self._expected
        if step is not None:
            factor = step ** round(math.log(factor, step))
        return [rate * factor for rate in self._prior]


class Beliefs:
    """Estimates of the market that a policy updates at every tick.

    Attributes:
        leave: Rate at which spot is lost, by zone.
        leave_any: Rate at which spot is lost, pooled over all zones.
        come: Rate at which spot comes back to a zone.
        change: Rate at which the spot price of a zone changes.
        prices: Observed spot prices as shares of the on-demand price, one for each change of a
            zone's price.
        age: Ticks since the job's current spot became available.
        outage: Ticks since the last spot of any requested zone.
    """

    def __init__(self, terms: Terms) -> None:
        gap_h, num_zones = terms.gap_h, len(terms.regions)
        self.leave = [Rate(LEAVE_PER_H, gap_h) for _ in range(num_zones)]
        self.leave_any = Rate(LEAVE_PER_H, gap_h)
        self.come = Rate(COME_PER_H, gap_h)
        self.change = Rate(CHANGE_PER_H, gap_h, 1.0)
        self.prices: list[float] = []
        self.age = self._unknown_age = round(UNKNOWN_AGE_H[0] / gap_h)
        self.outage = round(UNKNOWN_AGE_H[1] / gap_h)
        self._starts = [age_h / gap_h for age_h in AGES_H[1:]]
        self._asked, self._had = 2.0, 1.0  # a prior of one success in two requests
        self._down_at: dict[int, int] = {}  # tick at which each zone was last seen without spot
        self._tick = -1
        self._place: Place | None = None
        self._lost: Place | None = None  # place whose loss began the outage
        self._is_out = False
        self._usd_per_h: Sequence[float] = ()

    @property
    def up(self) -> float:
        """Probability that a zone has spot, if nothing else is known about it."""
        return self._had / self._asked

    def chance(self, zone: int) -> float:
        """Returns the probability that a zone has spot, by the time since it was seen without."""
        # A zone that was never seen without spot has the stationary probability `up`.
        since = self._tick - self._down_at.get(zone, -(10**9))
        return self.up * (1 - math.exp(-self.come.per_tick()[0] * max(since, 0) / self.up))

    def phase(self, age: int) -> int:
        """Returns the phase of an age in ticks: its index in `AGES_H`."""
        return sum(age >= start for start in self._starts)

    def see(self, view: View) -> None:
        """Learns from the result of the last tick's requests."""
        self._tick += 1
        self._see_prices(view)
        spot = view.place if view.place is not None and view.place.is_spot else None
        for place in view.refused:
            self._down_at[place.zone] = self._tick - 1
        if self._is_out and (spot is not None or view.refused):
            self._see_outage(view.refused, came_back=spot is not None)
        elif spot is None:
            self._is_out = self._is_out or bool(view.refused)
            self.outage += 1
        if spot is not None and spot != self._place:
            # Spot is at most as old as the time since its zone was last seen without any.
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
            self._lost, self._is_out, self.outage = lost, True, 0
        self._place = spot

    def _see_prices(self, view: View) -> None:
        prices = zip(view.spot_usd_per_h, view.on_demand_usd_per_h, strict=True)
        shares = [min(1.0, spot / max(on_demand, 1e-9)) for spot, on_demand in prices]
        if not self.prices:
            self.prices = shares
        else:
            self.change.watched(0, len(shares))
            pairs = zip(self._usd_per_h, view.spot_usd_per_h, strict=True)
            changed = [zone for zone, (before, after) in enumerate(pairs) if before != after]
            self.change.happened(len(changed))
            self.prices += [shares[zone] for zone in changed]
        self._usd_per_h = view.spot_usd_per_h

    def _see_outage(self, refused: Sequence[Place], came_back: bool) -> None:
        # Right after a loss, other zones are independent samples of `up`. Later requests go to
        # zones that were just seen without spot, so they tell how soon it comes back.
        if self.outage == 0:
            self._asked += sum(place != self._lost for place in refused) + came_back
            self._had += came_back
        else:
            self.come.watched(self.phase(self.outage), len(refused) + came_back)
            if came_back:
                self.come.happened()
        self.outage += 1
        self._is_out = not came_back

    def lasts(self, zone: int, age: float, horizon: float) -> tuple[float, float]:
        """Returns the expected ticks that spot stays up to a horizon, and the chance to reach it.

        Args:
            zone: Index of the zone.
            age: Age of the spot in ticks.
            horizon: Ticks to look ahead.
        """
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
