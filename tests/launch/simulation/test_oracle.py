"""The oracle against every possible sequence of places, and against every policy."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from launch.simulation.market import Market, markov_market
from launch.simulation.oracle import oracle_cost_usd
from launch.simulation.simulate import Job, Place, simulate
from launch.simulation.study import POLICIES


def tiny_market(seed, num_ticks, num_zones):
    """One-hour ticks, zones that come and go, prices that change."""
    rng = np.random.default_rng(seed)
    shape = (num_ticks, num_zones)
    return Market(
        gap_s=3600.0,
        zones=tuple(f"z{z}" for z in range(num_zones)),
        regions=tuple(f"r{z}" for z in range(num_zones)),
        nodes=(rng.random(shape) < 0.6).astype(np.int64) * 2,
        spot_usd_per_h=rng.uniform(0.1, 1.2, shape).round(2),
        on_demand_usd_per_h=rng.uniform(0.8, 1.2, shape).round(2),
        egress_usd_per_gb=0.01,
    )


class Scripted:
    """Follows a list of places; None is nowhere."""

    def __init__(self, script):
        self._script = iter(script)

    def decide(self, view):
        place = next(self._script)
        return [place] if place is not None else []


def brute_force_usd(market, job):
    zones = range(len(market.zones))
    choices = [None, *(Place(z, is_spot) for z in zones for is_spot in (True, False))]
    best = float("inf")
    for script in itertools.product(choices, repeat=int(job.deadline_h)):
        outcome = simulate(market, job, lambda _, script=script: Scripted(script))
        if outcome.met_deadline:
            best = min(best, outcome.cost_usd)
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("restart_h, interval_h", [(0.0, 2.0), (1.0, 2.0), (2.0, 1.0)])
def test_oracle_is_the_best_of_all_sequences_on_one_zone(seed, restart_h, interval_h):
    job = Job(3.0, 6.0, 2, restart_h, interval_h, 10.0)
    market = tiny_market(seed, 6, 1)
    assert oracle_cost_usd(market, job) == pytest.approx(brute_force_usd(market, job))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("checkpoint_gb", [0.0, 30.0])
def test_oracle_is_the_best_of_all_sequences_on_two_regions(seed, checkpoint_gb):
    job = Job(3.0, 5.0, 1, 1.0, 2.0, checkpoint_gb)
    market = tiny_market(10 + seed, 5, 2)
    assert oracle_cost_usd(market, job) == pytest.approx(brute_force_usd(market, job))


@pytest.mark.parametrize("seed", range(8))
def test_no_policy_that_is_in_time_is_cheaper(seed):
    rng = np.random.default_rng(seed)
    zones = 1 + seed % 3
    market = markov_market(
        seed,
        num_ticks=300,
        up_h=rng.uniform(0.5, 8, zones),
        down_h=rng.uniform(0.5, 8, zones),
        num_nodes=2,
        price_change_h=4.0,
        num_regions=2,
    )
    job = Job(10.0, 10.0 * rng.uniform(1.08, 2.0), 1 + seed % 2, 0.15, 0.5, 20.0)
    least_usd = oracle_cost_usd(market, job)
    for name, make_policy in POLICIES.items():
        outcome = simulate(market, job, make_policy)
        if outcome.met_deadline:
            assert outcome.cost_usd >= least_usd - 1e-9, name


def test_more_time_never_costs_more():
    market = markov_market(3, 400, [1.0], [2.0])
    jobs = [Job(10.0, deadline_h) for deadline_h in (11, 13, 16, 20, 30)]
    costs = [oracle_cost_usd(market, job) for job in jobs]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_oracle_leaves_before_it_would_lose_work():
    market = tiny_market(0, 8, 1)
    nodes = np.array([[2], [2], [2], [2], [0], [2], [2], [2]])
    market = replace(market, nodes=nodes, spot_usd_per_h=np.full((8, 1), 0.3))
    market = replace(market, on_demand_usd_per_h=np.ones((8, 1)))
    job = Job(4.0, 8.0, 1, 1.0, 8.0)  # 1 start, 2 h (leaves), then 1 start, 2 h: 6 ticks on spot
    assert oracle_cost_usd(market, job) == pytest.approx(6 * 0.3)
