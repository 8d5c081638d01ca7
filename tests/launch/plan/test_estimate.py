"""The planner's dollars a token against jobs that the market simulator plays, tick by tick."""

import statistics

import pytest

from launch.plan.interruptions import Interruptions, duration
from launch.simulation.market import markov_market
from launch.simulation.policies import SpotOnly
from launch.simulation.simulate import Job, simulate

SEEDS = 60


@pytest.mark.parametrize(
    ("up_h", "down_h", "restart_h", "interval_h"),
    [(6.0, 0.33, 0.1, 0.5), (2.0, 0.33, 0.1, 0.25), (24.0, 1.0, 0.2, 1.0)],
)
def test_dollars_and_hours_are_within_5_percent_of_the_simulated_markets(
    up_h, down_h, restart_h, interval_h
):
    compute_h = 48.0
    job = Job(compute_h, 10 * compute_h, 1, restart_h, interval_h)
    usd, hours = [], []
    for seed in range(SEEDS):
        market = markov_market(seed, 12 * 10 * 48, [up_h], [down_h])  # on-demand costs a dollar
        outcome = simulate(market, job, SpotOnly)
        assert outcome.finish_h is not None
        usd.append(outcome.cost_usd)
        hours.append(outcome.finish_h)
    found = duration(
        compute_h, Interruptions(1 / up_h, restart_h, down_h, interval_h, save_h=0.0, write_h=0.0)
    )
    estimate_usd = 0.3 * found.paid_h  # spot's share of the on-demand price there
    assert estimate_usd == pytest.approx(statistics.mean(usd), rel=0.05)
    assert (
        sum(h <= found.p95_h for h in hours) / SEEDS >= 0.85
    )  # ticks and a late start make it less
    assert found.p50_h == pytest.approx(statistics.median(hours), rel=0.05)
