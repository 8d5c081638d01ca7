"""What a job would have cost on a market, had a policy placed it: time goes by in ticks.

The rules, the same for every policy and for the oracle:

- A tick's nodes are paid for whole, in the place where the job is.
- A start, anywhere, takes `restart_h` in which nothing is computed and everything is paid.
- Progress is saved at every `checkpoint_interval_h` of it, and whenever the job leaves a place by
  itself. A preemption, at the beginning of a tick, loses what is not saved.
- A start in another region than the last pays for the checkpoint's way there.
- The gang is whole or not at all: a zone with fewer nodes than it needs has none for it.

What a policy sees is what a launcher could: prices, which are public; what became of the launches
that it asked for (a refused one costs nothing); and whether its own nodes are still there. It asks
for places in an order, and gets the first that can be had, so it cannot look without taking.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from core.errors import ConfigError
from launch.simulation.market import Market


class Place(NamedTuple):
    """Where a gang can be: spot or on-demand nodes of a zone."""

    zone: int
    is_spot: bool


@dataclass(frozen=True)
class Job:
    """What is to be computed, and until when.

    Attributes:
        compute_h: On the whole gang, without an interruption.
        deadline_h: From the beginning.
        gang_size: Nodes.
        restart_h: From a launch to the first new step.
        checkpoint_interval_h: Of progress; 0: nothing is ever lost (saved upon a notice).
        checkpoint_gb: What goes to another region with the job.
    """

    compute_h: float
    deadline_h: float
    gang_size: int = 1
    restart_h: float = 0.1
    checkpoint_interval_h: float = 0.5
    checkpoint_gb: float = 50.0

    def __post_init__(self) -> None:
        for name in ("compute_h", "gang_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "not above 0", "give more")
        for name in ("restart_h", "checkpoint_interval_h", "checkpoint_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "not a number from 0", "change it")
        least_h = self.compute_h + self.restart_h
        if not least_h <= self.deadline_h < math.inf:
            rule = f"{self.compute_h:g} h and a start take {least_h:g} h"
            raise ConfigError("deadline_h", f"{self.deadline_h:g}", rule, "give the job more time")


@dataclass(frozen=True)
class Terms:
    """What a policy knows beforehand: the job in whole ticks, and the market's places.

    Durations are rounded up, the deadline down.

    Attributes:
        gap_h: Length of a tick.
        work: Ticks of progress that make the job.
        deadline: Ticks from the beginning.
        restart: Ticks of a start.
        interval: Ticks of progress between two checkpoints; 1: nothing is ever lost.
        gang_size: Nodes.
        regions: Of each zone.
        egress_usd: Of a start in another region.
    """

    gap_h: float
    work: int
    deadline: int
    restart: int
    interval: int
    gang_size: int
    regions: tuple[str, ...]
    egress_usd: float

    @classmethod
    def of(cls, job: Job, market: Market) -> "Terms":
        """The terms of a job on a market.

        Raises:
            ConfigError: In whole ticks the job does not fit its deadline.
        """

        def ticks(hours: float) -> int:
            return math.ceil(hours / market.gap_h - 1e-9)

        deadline = math.floor(job.deadline_h / market.gap_h + 1e-9)
        work, restart = ticks(job.compute_h), ticks(job.restart_h)
        if work + restart > deadline:
            rule = f"too short for ticks of {market.gap_s:g} s"
            raise ConfigError("deadline_h", f"{job.deadline_h:g}", rule, "give the job more time")
        return cls(
            gap_h=market.gap_h,
            work=work,
            deadline=deadline,
            restart=restart,
            interval=min(work, max(1, ticks(job.checkpoint_interval_h))),  # work: only at the end
            gang_size=job.gang_size,
            regions=market.regions,
            egress_usd=job.checkpoint_gb * market.egress_usd_per_gb,
        )


@dataclass(frozen=True, slots=True)
class View:
    """What a policy sees at the beginning of a tick.

    Attributes:
        time_left: Ticks until the deadline.
        work_left: Ticks of progress that are missing.
        left_if_lost: The same at the end of this tick, should the job stay and then be preempted.
        place: Where the job is; None: nowhere.
        warming: Ticks until its start is over.
        preempted: The place that it has just lost.
        refused: Places that it asked for in vain at the last tick.
        data_region: Where its checkpoint is; None before the first start.
        spot_usd_per_h: Of a node, one a zone.
        on_demand_usd_per_h: Of a node, one a zone.
    """

    time_left: int
    work_left: int
    left_if_lost: int
    place: Place | None
    warming: int
    preempted: Place | None
    refused: Sequence[Place]
    data_region: str | None
    spot_usd_per_h: Sequence[float]
    on_demand_usd_per_h: Sequence[float]


class Policy(Protocol):
    """Places one job; a new one is made for each."""

    def decide(self, view: View) -> Sequence[Place]:
        """The places to be in, in order: the job is in the first that can be had, from now on.

        Where it is now can always be had. It is nowhere if nothing can.
        """
        ...


MakePolicy = Callable[[Terms], Policy]


@dataclass(frozen=True)
class Outcome:
    """What became of a job; one that is not done at its deadline ends there.

    Attributes:
        cost_usd: Of all nodes, and of the egress.
        finish_h: None: not finished.
        work_left_h: What is missing at the deadline.
        preemptions: How often it lost its nodes.
        starts: How often it started.
        migrations: Starts in another region than the last.
        lost_h: Progress that preemptions destroyed.
        restart_h: Paid for in starts.
        spot_h: On spot nodes, starts included.
        on_demand_h: On on-demand nodes, starts included.
        idle_h: Nowhere.
        egress_usd: Part of the cost.
    """

    cost_usd: float
    finish_h: float | None
    work_left_h: float
    preemptions: int
    starts: int
    migrations: int
    lost_h: float
    restart_h: float
    spot_h: float
    on_demand_h: float
    idle_h: float
    egress_usd: float

    @property
    def met_deadline(self) -> bool:
        """Whether it finished in time."""
        return self.finish_h is not None


def simulate(market: Market, job: Job, make_policy: MakePolicy, first_tick: int = 0) -> Outcome:
    """Runs a job on a market.

    Args:
        market: It has to last until the job's deadline.
        job: What to compute.
        make_policy: Who places it.
        first_tick: Where in the market the job begins.

    Raises:
        ConfigError: The market ends before the deadline.
    """
    terms = Terms.of(job, market)
    window = slice(first_tick, first_tick + terms.deadline)
    if window.stop > market.num_ticks:
        rule = f"the market ends {window.stop - market.num_ticks} ticks before the deadline"
        raise ConfigError("first_tick", first_tick, rule, "give a longer trace or a shorter job")
    run = _Run(terms, make_policy(terms))
    available = (market.nodes[window] >= job.gang_size).tolist()
    spot_usd = market.spot_usd_per_h[window].tolist()
    on_demand_usd = market.on_demand_usd_per_h[window].tolist()
    for tick in range(terms.deadline):
        run.tick(terms.deadline - tick, available[tick], spot_usd[tick], on_demand_usd[tick])
        if run.progress == terms.work:
            break
    return run.outcome()


class _Run:
    """A job on its way."""

    def __init__(self, terms: Terms, policy: Policy) -> None:
        self._terms, self._policy = terms, policy
        self.progress = 0
        self._saved = 0
        self._place: Place | None = None
        self._warming = 0
        self._refused: list[Place] = []
        self._data_region: str | None = None
        self._cost_usd = self._egress_usd = 0.0
        self._preemptions = self._starts = self._migrations = 0
        self._lost = self._restart = self._spot = self._on_demand = self._idle = 0

    def tick(
        self,
        time_left: int,
        available: Sequence[bool],
        spot_usd: Sequence[float],
        on_demand_usd: Sequence[float],
    ) -> None:
        """One tick: a preemption, perhaps; the policy's choice; what is computed and paid."""
        preempted = None
        if self._place is not None and self._place.is_spot and not available[self._place.zone]:
            preempted, self._place = self._place, None
            self._preemptions += 1
            self._lost += self.progress - self._saved
            self.progress = self._saved
        wanted = self._policy.decide(
            View(
                time_left=time_left,
                work_left=self._terms.work - self.progress,
                left_if_lost=self._left_if_lost(),
                place=self._place,
                warming=self._warming if self._place is not None else 0,
                preempted=preempted,
                refused=self._refused,
                data_region=self._data_region,
                spot_usd_per_h=spot_usd,
                on_demand_usd_per_h=on_demand_usd,
            )
        )
        self._go(wanted, available)
        if self._place is None:
            self._idle += 1
            return
        zone, is_spot = self._place
        usd_per_h = spot_usd[zone] if is_spot else on_demand_usd[zone]
        self._cost_usd += usd_per_h * self._terms.gap_h * self._terms.gang_size
        self._spot += is_spot
        self._on_demand += not is_spot
        if self._warming:
            self._warming -= 1
            self._restart += 1
            return
        self.progress += 1
        if self.progress % self._terms.interval == 0:
            self._saved = self.progress

    def _left_if_lost(self) -> int:
        """Work left once this tick is over and the place is lost."""
        if self._place is None or not self._place.is_spot:
            return self._terms.work - self.progress
        after = self.progress + (self._warming == 0)
        is_safe = after % self._terms.interval == 0 or after == self._terms.work
        return self._terms.work - (after if is_safe else self._saved)

    def _go(self, wanted: Sequence[Place], available: Sequence[bool]) -> None:
        """Takes the first place that can be had."""
        self._refused = []
        chosen = None
        for place in wanted:
            if not place.is_spot or available[place.zone]:
                chosen = place
                break
            self._refused.append(place)
        if chosen == self._place:
            return
        self._saved = self.progress
        self._place = chosen
        if chosen is None:
            return
        self._starts += 1
        self._warming = self._terms.restart
        region = self._terms.regions[chosen.zone]
        if self._data_region not in (None, region):
            self._migrations += 1
            self._egress_usd += self._terms.egress_usd
            self._cost_usd += self._terms.egress_usd
        self._data_region = region

    def outcome(self) -> Outcome:
        """What became of it."""
        gap_h = self._terms.gap_h
        ticks = self._spot + self._on_demand + self._idle
        is_done = self.progress == self._terms.work
        return Outcome(
            cost_usd=self._cost_usd,
            finish_h=ticks * gap_h if is_done else None,
            work_left_h=(self._terms.work - self.progress) * gap_h,
            preemptions=self._preemptions,
            starts=self._starts,
            migrations=self._migrations,
            lost_h=self._lost * gap_h,
            restart_h=self._restart * gap_h,
            spot_h=self._spot * gap_h,
            on_demand_h=self._on_demand * gap_h,
            idle_h=self._idle * gap_h,
            egress_usd=self._egress_usd,
        )
