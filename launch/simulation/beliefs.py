"""What a job's own launches and losses teach about a market of spot nodes."""

import math
from collections.abc import Sequence

from launch.simulation.simulate import Place, Terms, View

# Prior rates per hour by age, pooled over nine zones in February 2023. What has lasted, lasts:
# both spot and its outages are the safer the older they are.
AGES_H = (0.0, 0.5, 2.0, 8.0)
LEAVE_PER_H = (1.2, 0.55, 0.18, 0.06)
COME_PER_H = (1.33, 0.57, 0.28, 0.12)
CHANGE_PER_H = (1 / 48,)  # of a price: too seldom to be worth waiting for, until one is seen
PRIOR_EVENTS = 4.0  # how many events of its own weigh as much as the prior
STEP = 1.3  # to which learnt rates are rounded, so that plans are used again
UNKNOWN_AGE_H = (0.5, 2.0)  # of spot, and of an outage, whose beginning was not seen


class Rate:
    """How often something happens in a tick, by age: the prior times a learnt factor.

    The factor is the mean of its Gamma posterior, which counts what happened and what was expected.
    """

    def __init__(self, per_h: Sequence[float], gap_h: float, prior: float = PRIOR_EVENTS) -> None:
        self._prior = [rate * gap_h for rate in per_h]
        self._happened = self._expected = prior

    def watched(self, phase: int, times: int = 1) -> None:
        """As many ticks of that age passed."""
        self._expected += self._prior[phase] * times

    def happened(self, times: int = 1) -> None:
        """It happened."""
        self._happened += times

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
        come: How often spot comes back to a zone.
        change: How often the spot price of a zone changes.
        prices: Spot prices that were seen, as shares of the on-demand price: one a change and zone.
        age: Ticks for which the spot that the job is on has been there.
        outage: Ticks for which no zone that was asked has had any.
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
        self._asked, self._had = 2.0, 1.0
        self._down_at: dict[int, int] = {}  # tick at which each zone was last seen without
        self._tick = -1
        self._place: Place | None = None
        self._lost: Place | None = None  # when the outage began
        self._is_out = False
        self._usd_per_h: Sequence[float] = ()

    @property
    def up(self) -> float:
        """Chance that a zone has spot, of which nothing is known."""
        return self._had / self._asked

    def chance(self, zone: int) -> float:
        """Chance that a zone has spot now, by when it was last seen without."""
        since = self._tick - self._down_at.get(zone, -(10**9))
        return self.up * (1 - math.exp(-self.come.per_tick()[0] * max(since, 0) / self.up))

    def phase(self, age: int) -> int:
        """Of an age in ticks."""
        return sum(age >= start for start in self._starts)

    def see(self, view: View) -> None:
        """Learns from what became of the last tick's wishes."""
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
