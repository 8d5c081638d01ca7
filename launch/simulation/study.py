"""Compares all policies on the same stretches of a market."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import ConfigError
from launch.simulation.deadline_aware import DeadlineAware
from launch.simulation.market import Market
from launch.simulation.oracle import oracle_cost_usd
from launch.simulation.policies import Eager, Failover, Greedy, OnDemand, SpotOnly, UniformProgress
from launch.simulation.simulate import Job, MakePolicy, Outcome, Terms, simulate

OURS = "deadline-aware"
ORACLE = "oracle"
POLICIES: Mapping[str, MakePolicy] = {
    "on-demand": OnDemand,
    "spot only": SpotOnly,
    "failover": Failover,
    "eager": Eager,
    "greedy": Greedy,
    "uniform progress": UniformProgress,
    OURS: DeadlineAware,
}


@dataclass(frozen=True)
class Row:
    """The results of a policy, as means over all starts.

    Attributes:
        policy: Name of the policy.
        saving: Saved share of the cost with on-demand nodes alone. It is meaningless if a job
            missed its deadline, since that job paid for only a part of its work.
        saving_error: Standard error of the saving.
        missed: Share of the starts that missed the deadline.
        worst_saving: Lowest saving of any start.
    """

    policy: str
    saving: float
    saving_error: float
    missed: float
    worst_saving: float
    cost_usd: float
    preemptions: float | None = None
    starts: float | None = None
    migrations: float | None = None
    lost_h: float | None = None
    spot_h: float | None = None
    on_demand_h: float | None = None
    idle_h: float | None = None


def compare(
    market: Market,
    job: Job,
    num_starts: int,
    seed: int = 0,
    policies: Mapping[str, MakePolicy] = POLICIES,
    with_oracle: bool = True,
) -> list[Row]:
    """Runs a job with every policy from the same random moments of a market.

    The order of the zones is random at each start, so that no zone is always the first among those
    of equal price.

    Args:
        market: Market on which the job runs.
        job: Job to place.
        num_starts: Number of random moments.
        seed: Seed of the random moments; equal seeds give equal starts.
        policies: Policies by name.
        with_oracle: True to add the least possible cost as the last row.

    Raises:
        ConfigError: The market is shorter than the job's deadline.
    """
    num_first_ticks = market.num_ticks - Terms.of(job, market).deadline + 1
    if num_first_ticks < 1:
        hours = market.num_ticks * market.gap_h
        rule = f"is longer than the traces, which have {hours:.0f} h"
        raise ConfigError("deadline_h", f"{job.deadline_h:g}", rule, "give longer traces")
    rng = np.random.default_rng(seed)
    first_ticks = rng.integers(0, num_first_ticks, num_starts).tolist()
    markets = [market.only(rng.permutation(len(market.zones)).tolist()) for _ in first_ticks]
    where = list(zip(markets, first_ticks, strict=True))
    # Every policy runs from the same moments and orders, so that differences between rows are not
    # due to luck.
    base_usd = np.array([simulate(m, job, OnDemand, tick).cost_usd for m, tick in where])
    rows = []
    for name, make_policy in policies.items():
        outcomes = [simulate(m, job, make_policy, tick) for m, tick in where]
        rows.append(_row(name, base_usd, outcomes))
    if with_oracle:
        costs = np.array([oracle_cost_usd(market, job, tick) for tick in first_ticks])
        rows.append(Row(ORACLE, *_savings(base_usd, costs), 0.0, *_worst(base_usd, costs)))
    return rows


def _savings(base_usd: np.ndarray, costs_usd: np.ndarray) -> tuple[float, float]:
    savings = 1 - costs_usd / base_usd
    error = savings.std() / max(1, len(savings) - 1) ** 0.5
    return float(1 - costs_usd.sum() / base_usd.sum()), float(error)


def _worst(base_usd: np.ndarray, costs_usd: np.ndarray) -> tuple[float, float]:
    return float((1 - costs_usd / base_usd).min()), float(costs_usd.mean())


def _row(name: str, base_usd: np.ndarray, outcomes: Sequence[Outcome]) -> Row:
    def mean(attribute: str) -> float:
        return float(np.mean([getattr(outcome, attribute) for outcome in outcomes]))

    costs_usd = np.array([outcome.cost_usd for outcome in outcomes])
    return Row(
        name,
        *_savings(base_usd, costs_usd),
        1 - mean("met_deadline"),
        *_worst(base_usd, costs_usd),
        **{
            key: mean(key)
            for key in (
                *("preemptions", "starts", "migrations", "lost_h"),
                *("spot_h", "on_demand_h", "idle_h"),
            )
        },
    )
