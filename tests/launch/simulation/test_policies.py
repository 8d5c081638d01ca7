"""No policy with a safety net is ever late; each does what it is known for; ours plans best."""

import json
from dataclasses import replace

import numpy as np
import pytest

from launch.__main__ import main
from launch.simulation.availability import Beliefs
from launch.simulation.deadline_aware import DeadlineAware
from launch.simulation.dynamic_program import Model, make_plan
from launch.simulation.market import markov_market
from launch.simulation.policies import Eager, Failover, Greedy, OnDemand, UniformProgress
from launch.simulation.simulate import Job, Place, Terms, View, simulate
from launch.simulation.study import OURS, compare

WITH_NET = [OnDemand, Greedy, UniformProgress, DeadlineAware]


def view(time_left, work_left, place=None, **more):
    values = dict(
        time_left=time_left,
        work_left=work_left,
        left_if_lost=work_left,
        place=place,
        warming=0,
        preempted=None,
        refused=[],
        data_region=None,
        spot_usd_per_h=[0.3, 0.3, 0.3],
        on_demand_usd_per_h=[1.0, 1.0, 1.0],
    )
    return View(**{**values, **more})


TERMS = Terms(0.1, 100, 200, 2, 5, 1, ("r0", "r0", "r1"), 0.0)


@pytest.mark.parametrize("make_policy", WITH_NET)
@pytest.mark.parametrize("seed", range(8))
def test_no_deadline_is_missed(make_policy, seed):
    """At the least slack that the goal names, and with less; on the worst markets."""
    rng = np.random.default_rng(seed)
    zones = 1 + seed % 3
    up_h, down_h = rng.uniform(0.1, 3, zones), rng.uniform(0.1, 10, zones)
    market = markov_market(seed, 400, up_h, down_h, 195.0, 4, 2.0, num_regions=2)
    ratio = (1.08, 1.08, 1.04, 1.5)[seed % 4]
    job = Job(8.0, 8.0 * ratio, 1 + seed % 4, 0.11, (0.0, 0.3, 1.0)[seed % 3], 10.0)
    for first_tick in (0, 80):
        assert simulate(market, job, make_policy, first_tick).met_deadline


def test_spot_that_is_always_lost_in_time_to_hurt_makes_nobody_late():
    """Spot comes for just less than a checkpoint, for ever."""
    nodes = (np.arange(2000) % 12 < 11)[:, None].astype(np.int64)
    market = replace(markov_market(0, 2000, [1.0], [1.0], 300.0), nodes=nodes)
    job = Job(20.0, 21.6, restart_h=0.1, checkpoint_interval_h=1.0)
    for make_policy in WITH_NET:
        assert simulate(market, job, make_policy).met_deadline


def test_failover_returns_and_eager_moves_on():
    lost = view(150, 100, preempted=Place(1, True))
    assert Failover(TERMS).decide(lost)[0] == Place(1, True)
    assert [place.zone for place in Eager(TERMS).decide(lost)] == [2, 0, 1]
    running = view(150, 100, place=Place(2, True))
    assert Eager(TERMS).decide(running) == [Place(2, True)]


def test_greedy_waits_until_it_must_not():
    policy = Greedy(TERMS)
    assert all(place.is_spot for place in policy.decide(view(104, 100)))
    assert policy.decide(view(102, 100)) == [Place(0, False)]
    assert policy.decide(view(102, 90, place=Place(0, False))) == [Place(0, False)]


def test_uniform_progress_follows_the_clock_with_hysteresis():
    def ends_on_demand(time_left, work_left, place=None):
        wanted = UniformProgress(TERMS).decide(view(time_left, work_left, place))
        return bool(wanted) and not wanted[-1].is_spot

    on_demand = Place(0, False)
    assert not ends_on_demand(100, 50)  # just in time
    assert ends_on_demand(100, 51)
    assert ends_on_demand(100, 50, on_demand)  # half of 2 * 2 ticks more, once there
    assert not ends_on_demand(100, 48, on_demand)


def test_the_plan_waits_with_slack_and_pays_without():
    steady = dict(widths=(5.0, float("inf")), leave=(0.03, 0.03), come=(0.1, 0.1))
    plan = make_plan(Model(120, 60, 2, 1, 0.3, 0.0, replaced=0.0, **steady))
    assert all(plan.wait(120, 0, slack) for slack in range(50, 61))
    assert not all(plan.wait(120, 0, slack) for slack in range(2, 12))
    assert plan.take(120, 0, 60) and not plan.take(120, 0, 2)
    assert plan.slack_price(120, 8) > plan.slack_price(120, 50) > 0
    dear = make_plan(Model(120, 60, 2, 1, 1.0, 0.0, replaced=0.0, **steady))
    assert not any(dear.take(120, 0, slack) for slack in range(61))


def test_beliefs_follow_what_happens():
    calm, rough = Beliefs(TERMS), Beliefs(TERMS)
    here = Place(0, True)
    for tick in range(60):
        calm.see(view(200 - tick, 100, place=here))
        is_lost = tick % 4 == 3
        rough.see(
            view(200 - tick, 100, None if is_lost else here, preempted=here if is_lost else None)
        )
    assert calm.leave[0].per_tick()[0] < calm.leave[1].per_tick()[0] < rough.leave[0].per_tick()[0]
    assert calm.lasts(0, 0, 50)[0] > calm.lasts(1, 0, 50)[0] > rough.lasts(0, 0, 50)[0]
    assert calm.lasts(0, 0, 5)[0] <= 5
    assert calm.lasts(0, 100, 50)[0] > calm.lasts(0, 0, 50)[0]  # what has lasted, lasts


def test_ours_leaves_for_spot_that_is_much_cheaper_unless_egress_eats_it():
    place = Place(0, True)
    prices = [0.9, 0.3, 0.9]
    running = view(190, 90, place, data_region="r0", spot_usd_per_h=prices)
    assert DeadlineAware(TERMS).decide(running)[0] == Place(1, True)
    elsewhere = view(190, 90, place, data_region="r0", spot_usd_per_h=[0.9, 0.9, 0.3])
    assert DeadlineAware(TERMS).decide(elsewhere)[0] == Place(2, True)
    far = replace(TERMS, egress_usd=1000.0)
    assert DeadlineAware(far).decide(elsewhere) == [place]


def test_ours_takes_no_spot_that_is_dearer_than_on_demand():
    wanted = DeadlineAware(TERMS).decide(view(190, 90, spot_usd_per_h=[1.2, 1.1, 1.5]))
    assert not any(place.is_spot for place in wanted)
    dearer = view(110, 90, Place(0, True), spot_usd_per_h=[1.2, 1.1, 1.5])
    assert not any(place.is_spot for place in DeadlineAware(TERMS).decide(dearer))


def test_ours_saves_most_on_a_tight_market():
    market = markov_market(0, 3000, [1.5], [1.5], 600.0)
    job = Job(24.0, 24.0 * 1.5, restart_h=0.1, checkpoint_interval_h=0.25)
    policies = {"greedy": Greedy, "uniform": UniformProgress, OURS: DeadlineAware}
    savings = {row.policy: row.saving for row in compare(market, job, 12, policies=policies)}
    assert max(savings["greedy"], savings["uniform"]) < savings[OURS] < savings["oracle"]


def test_ours_waits_for_a_better_price_where_prices_change():
    market = markov_market(1, 6000, [4.0] * 2, [2.0] * 2, 600.0, 1, 12.0, num_regions=2)
    job = Job(24.0, 24.0 * 1.9, restart_h=0.1, checkpoint_interval_h=0.5, checkpoint_gb=50.0)
    policies = {"greedy": Greedy, "uniform": UniformProgress, OURS: DeadlineAware}
    rows = {row.policy: row for row in compare(market, job, 12, policies=policies)}
    assert rows[OURS].missed == 0
    assert rows[OURS].idle_h > 2 * rows["greedy"].idle_h
    assert rows[OURS].cost_usd < 0.93 * min(rows["greedy"].cost_usd, rows["uniform"].cost_usd)


def test_beliefs_about_prices():
    beliefs = Beliefs(TERMS)
    beliefs.see(view(200, 100))
    assert set(beliefs.prices) == {0.3}
    before = beliefs.change.per_tick()[0]
    beliefs.see(view(199, 100, spot_usd_per_h=[0.3, 0.2, 0.3]))
    assert beliefs.prices == [0.3, 0.3, 0.3, 0.2]
    assert beliefs.change.per_tick()[0] > before


def test_the_command_prints_what_the_study_finds(capsys, tmp_path):
    trace = tmp_path / "us-east-1a_x.json"
    data = markov_market(1, 600, [2.0], [1.0]).nodes[:, 0].tolist()
    trace.write_text(json.dumps({"metadata": {"gap_seconds": 300}, "data": data}))
    words = f"simulate {trace} --compute-hours 10 --deadline-over-compute 1.25 --starts 3".split()
    assert main([*words, "--json"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["oracle"]["saving"] >= rows[OURS]["saving"] > 0 == rows[OURS]["missed"]
    assert main(words) == 0
    assert f"{rows['oracle']['saving']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    ["none.json", "--deadline-over-compute 0.9", "--starts 0", "--spot-usd -1 none.json"],
)
def test_the_command_refuses_in_one_line(words, capsys):
    assert main(["simulate", *words.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1
