"""The budget holds on any market, and what it has paid for is not lost."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from launch.budget.budget import Budget, cost_usd
from launch.simulation.market import markov_market
from tests.launch.budget.simulated_job import Job, simulate, spot_job

MARKETS = 1000


def draw(seed, **more):
    """A market, a job on it, and a budget that may be too small for either."""
    rng = np.random.default_rng(seed)
    tick_s = float(rng.choice([60.0, 300.0, 900.0]))
    zones = int(rng.integers(1, 4))
    market = markov_market(
        seed,
        num_ticks=300,
        up_h=rng.uniform(0.2, 12, zones),
        down_h=rng.uniform(0.05, 2, zones),
        gap_s=tick_s,
        price_change_h=float(rng.choice([0.2, 2.0, np.inf])),
    )
    stop_s = tick_s * rng.uniform(0.05, 3)
    job = Job(
        compute_s=tick_s * rng.uniform(5, 250),
        restart_s=tick_s * rng.uniform(0, 3),
        interval_s=tick_s * rng.uniform(0.5, 20),
        save_s=stop_s * rng.uniform(0.1, 1),
        blocking_s=rng.uniform(0, 5),
        usd_per_h=rng.uniform(0.5, 100),
        stop_s=stop_s,
        longest_stop_s=stop_s,
    )
    job = replace(job, **{key: value(job) for key, value in more.items()})
    whole_usd = cost_usd(job.compute_s, 0.3 * job.usd_per_h)
    return market, job, rng, float(whole_usd * rng.choice([0.01, 0.2, 0.5, 0.9, 2.0]))


def test_the_budget_holds_and_a_checkpoint_is_there_on_1000_markets():
    ends = Counter()
    for seed in range(MARKETS):
        market, job, rng, budget_usd = draw(seed)
        found = simulate(market, job, rng, budget_usd)
        ends[found.end] += 1
        cap = job.usd_per_h * market.on_demand_usd_per_h.max()
        tick_usd = cost_usd(market.gap_s, cap)
        # Spend: really, and by the ledger, which may know of more but never of less
        assert found.used_usd <= found.account.spent_usd + 1e-9, seed
        assert found.account.spent_usd <= budget_usd + tick_usd, seed
        assert found.account.spent_usd <= budget_usd + 1e-9, seed  # as stops last as believed
        # A checkpoint: all that was computed, unless a machine was lost before it was saved
        if found.end == "stopped":
            assert found.saved_s == found.computed_s, seed
        assert found.end != "killed", seed
        if found.end == "refused" and not found.account.starts:
            assert budget_usd < cost_usd(market.gap_s + job.stop_s, cap), seed
        # It stops no earlier than it must
        if found.end == "refused":
            assert found.left_usd <= cost_usd(market.gap_s + job.stop_s, cap), seed
        if found.end == "stopped":
            assert found.left_usd <= cost_usd(market.gap_s + job.stop_s, cap), seed
    assert {"finished", "stopped", "refused"} <= set(ends), ends
    assert min(ends["finished"], ends["stopped"]) > MARKETS // 10, ends


def test_a_stop_that_is_slower_than_believed_is_cut_and_the_last_save_is_there():
    """Money is the limit that holds; what is lost is no more than between two saves."""
    killed = 0
    for seed in range(300):
        market, job, rng, budget_usd = draw(seed, longest_stop_s=lambda job: 20 * job.stop_s)
        found = simulate(market, job, rng, budget_usd)
        assert found.account.spent_usd <= budget_usd + 1e-9
        if found.end == "killed":
            killed += 1
            # That save may have been under way, and the one before it is there.
            lost_s = found.computed_s - found.saved_s
            assert lost_s <= 2 * job.interval_s + job.save_s + 1e-6
    assert killed > 30


def test_arithmetic():
    budget = Budget(limit_usd=10.0, tick_s=60.0, spent_usd=9.0)
    assert not budget.must_stop(usd_per_h=20.0, stop_s=120.0)  # exactly
    assert budget.must_stop(usd_per_h=20.1, stop_s=120.0)
    budget.spend(90.0, 20.0)
    assert budget.spent_usd == pytest.approx(9.5)
    assert budget.left_s(20.0) == pytest.approx(90.0)
    budget.spend(-30.0, 20.0)
    assert budget.left_s(20.0) == pytest.approx(120.0)
    assert not Budget(0.0, 60.0).must_stop(0.0, 60.0)  # what costs nothing needs no money


@pytest.mark.parametrize(
    ("mean_h", "restart_h", "interval_h"), [(2.0, 0.1, 0.5), (6.0, 0.25, 0.5), (24.0, 0.1, 2.0)]
)
def test_dollars_a_token_in_the_ledger_are_what_arithmetic_expects(mean_h, restart_h, interval_h):
    """To first order a preemption costs a start, half an interval and half a tick."""
    found = [
        spot_job(
            seed,
            compute_h=30.0,
            usd_per_h=8.0,
            mean_h_between_preemptions=mean_h,
            restart_h=restart_h,
            wait_h=0.3,
            interval_h=interval_h,
        )
        for seed in range(40)
    ]
    lost_h = restart_h + interval_h / 2 + 300 / 3600 / 2
    usd = 8.0 * (30.0 + restart_h) / (1 - lost_h / mean_h)
    expected = usd / (30.0 * 3600 * 1000.0) * 1e6
    mean = np.mean([f.account.usd_per_million_tokens for f in found])
    assert mean == pytest.approx(expected, rel=0.15)
    assert np.mean([f.preemptions for f in found]) > 20 / mean_h
    for outcome in found:
        assert outcome.account.tokens == pytest.approx(30.0 * 3600 * 1000.0)
        assert outcome.used_usd <= outcome.account.spent_usd
