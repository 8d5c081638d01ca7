"""Simulates a job on a market with a policy that places it, tick by tick.

The rules are the same for every policy and for the oracle:

- Nodes are paid for in whole ticks, in the place where the job is.
- Every start takes `restart_h`, which are paid for and in which nothing is computed.
- Progress is saved after every `checkpoint_interval_h` of it, and whenever the job leaves a place
  by itself. A preemption, at the beginning of a tick, loses unsaved progress.
- A start in another region than the last one pays for moving the checkpoint.
- The gang is placed as a whole: a zone with too few nodes has none for it.

A policy sees only what a launcher could see: public prices, the results of its requests (a refused
one is free), and whether its own nodes still exist. It requests places in an order and gets the
first that is available, so that it cannot look without taking.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from core.errors import ConfigError
from launch.simulation.market import Market


class Place(NamedTuple):
    """A place for a gang: the spot or on-demand nodes of a zone."""

    zone: int
    is_spot: bool


@dataclass(frozen=True)
class Job:
    """A job with its deadline.

    Attributes:
        compute_h: Hours of computing on the whole gang, without an interruption.
        deadline_h: Hours from the start to the deadline.
        gang_size: Number of nodes.
        restart_h: Hours from a launch to the first new step.
        checkpoint_interval_h: Hours of progress between two checkpoints; 0: nothing is ever lost,
            as with a save upon notice.
        checkpoint_gb: Gigabytes that move to another region with the job.
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
                raise ConfigError(name, getattr(self, name), "must be above 0", "increase it")
        for name in ("restart_h", "checkpoint_interval_h", "checkpoint_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "must be at least 0", "increase it")
        least_h = self.compute_h + self.restart_h
        if not least_h <= self.deadline_h < math.inf:
            rule = f"{self.compute_h:g} h and a start take {least_h:g} h"
            raise ConfigError("deadline_h", f"{self.deadline_h:g}", rule, "give the job more time")


@dataclass(frozen=True)
class Terms:
    """The facts that a policy knows in advance: the job in whole ticks, and the market's regions.

    Durations are rounded up and the deadline down.

    Attributes:
        gap_h: Length of a tick in hours.
        work: Ticks of progress that complete the job.
        deadline: Ticks from the start to the deadline.
        restart: Ticks of a start.
        interval: Ticks of progress between two checkpoints; 1: nothing is ever lost.
        gang_size: Number of nodes.
        regions: Region of each zone.
        egress_usd: Cost of a start in another region.
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
        """Returns the terms of a job on a market.

        Raises:
            ConfigError: The job in whole ticks does not fit its deadline.
        """

        # 1e-9 absorbs rounding errors, here and below: 0.3 / 0.1 is 2.9999999999999996.
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
            interval=min(work, max(1, ticks(job.checkpoint_interval_h))),  # at work: one at the end
            gang_size=job.gang_size,
            regions=market.regions,
            egress_usd=job.checkpoint_gb * market.egress_usd_per_gb,
        )


@dataclass(frozen=True, slots=True)
class View:
    """The information for a policy at the beginning of a tick.

    Attributes:
        time_left: Ticks until the deadline.
        work_left: Missing ticks of progress.
        left_if_lost: Missing ticks of progress after this tick, if the job stays and is then
            preempted.
        place: Current place of the job; None: it has no nodes.
        warming: Ticks until the current start is over.
        preempted: Place that the job has just lost; None if it has not.
        refused: Places that were requested at the last tick and not available.
        data_region: Region of the checkpoint; None before the first start.
        spot_usd_per_h: Price of a spot node, for each zone.
        on_demand_usd_per_h: Price of an on-demand node, for each zone.
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
    """A policy that places one job; every job has its own instance."""

    def decide(self, view: View) -> Sequence[Place]:
        """Returns the places to request, in order; the job gets the first that is available.

        The current place is always available. The job has no nodes if none is.
        """
        ...


MakePolicy = Callable[[Terms], Policy]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job, which ends at its deadline even if it is not done.

    Attributes:
        cost_usd: Cost of all nodes and of egress.
        finish_h: Hours until the job was done; None: it was not done.
        work_left_h: Missing hours of progress at the deadline.
        preemptions: Number of times that the job lost its nodes.
        starts: Number of starts.
        migrations: Number of starts in another region than the last one.
        lost_h: Hours of progress that preemptions destroyed.
        restart_h: Hours paid for starts.
        spot_h: Hours on spot nodes, including starts.
        on_demand_h: Hours on on-demand nodes, including starts.
        idle_h: Hours without nodes.
        egress_usd: Cost of egress, which is part of `cost_usd`.
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
        """True if the job finished in time."""
        return self.finish_h is not None


def simulate(market: Market, job: Job, make_policy: MakePolicy, first_tick: int = 0) -> Outcome:
    """Runs a job on a market.

    Args:
        market: Market that lasts at least until the job's deadline.
        job: Job to place.
        make_policy: Function that makes the policy for the job.
        first_tick: Tick of the market at which the job begins.

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
    """The state of a running job."""

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
        """Simulates one tick: a possible preemption, the policy's choice, computing and paying."""
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
        """Returns the work left after this tick if the job stays and is then preempted."""
        if self._place is None or not self._place.is_spot:
            return self._terms.work - self.progress
        after = self.progress + (self._warming == 0)
        is_safe = after % self._terms.interval == 0 or after == self._terms.work
        return self._terms.work - (after if is_safe else self._saved)

    def _go(self, wanted: Sequence[Place], available: Sequence[bool]) -> None:
        """Moves the job to the first available place."""
        self._refused = []
        chosen = None
        for place in wanted:
            if not place.is_spot or available[place.zone]:
                chosen = place
                break
            self._refused.append(place)
        if chosen == self._place:
            return
        self._saved = self.progress  # a job that leaves by itself saves first
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
        """Returns the outcome of the job so far."""
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
