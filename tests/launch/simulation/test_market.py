"""Traces are read or refused; the simulator pays, loses and moves as its rules say."""

import json

import numpy as np
import pytest

from core.errors import ConfigError
from launch.__main__ import main
from launch.simulation.market import Market, markov_market, read_market
from launch.simulation.simulate import Job, Place, Terms, simulate


def write_trace(folder, name, data, gap_s=300, **more):
    path = folder / f"{name}_v100_1.json"
    path.write_text(json.dumps({"metadata": {"gap_seconds": gap_s}, "data": data, **more}))
    return path


def hourly(nodes, spot_usd=0.25, regions=None):
    """A market of one-hour ticks: `nodes` by zone."""
    nodes = np.array(nodes, np.int64).T
    spot = np.broadcast_to(np.asarray(spot_usd, np.float64).T, nodes.shape).copy()
    zones = tuple(f"z{z}" for z in range(nodes.shape[1]))
    return Market(3600.0, zones, regions or zones, nodes, spot, np.ones(nodes.shape), 0.1)


class Scripted:
    """Wants a list of places, one a tick; keeps what it saw."""

    def __init__(self, *script):
        self.script, self.views = list(script), []

    def __call__(self, terms):
        return self

    def decide(self, view):
        self.views.append(view)
        return self.script[len(self.views) - 1]


SPOT, OTHER, ON_DEMAND = Place(0, True), Place(1, True), Place(0, False)


def test_a_trace_gives_nodes_and_prices(tmp_path):
    prices = [0.5, 0.75, 0.5]
    paths = [
        write_trace(tmp_path, "us-east-1a", [0, 1, 4]),
        write_trace(tmp_path, "us-west-2b", [2, 2, 0], spot_usd_per_h=prices),
    ]
    market = read_market(paths, spot_usd_per_h=0.9, on_demand_usd_per_h=3.0)
    assert market.zones == ("us-east-1a", "us-west-2b")
    assert market.regions == ("us-east-1", "us-west-2")
    assert market.nodes.tolist() == [[0, 2], [1, 2], [4, 0]]
    assert market.spot_usd_per_h.T.tolist() == [[0.9] * 3, prices]
    assert market.on_demand_usd_per_h.tolist() == [[3.0, 3.0]] * 3
    assert market.only([1]).spot_usd_per_h.T.tolist() == [prices]


def test_what_is_no_market_is_refused(tmp_path):
    good = write_trace(tmp_path, "a", [1, 1])
    bad = {
        "No such file": tmp_path / "none.json",
        "not JSON": tmp_path / "text.json",
        "not a trace": tmp_path / "list.json",
        "3 points of 300 s, not 2 of 300": write_trace(tmp_path, "ragged", [1, 1, 1]),
        "2 points of 60 s, not 2 of 300": write_trace(tmp_path, "gap", [1, 1], gap_s=60),
        "data must be": write_trace(tmp_path, "negative", [1, -1]),
        "spot_usd_per_h must be": write_trace(
            tmp_path, "price", [1, 1], spot_usd_per_h=[0.1, -0.1]
        ),
        "on_demand_usd_per_h must be": write_trace(
            tmp_path, "free", [1, 1], on_demand_usd_per_h=[1, 0]
        ),
        "trace=a,a: ": good,
    }
    bad["not JSON"].write_text("{")
    bad["not a trace"].write_text("[1, 2]")
    for rule, path in bad.items():
        with pytest.raises(ConfigError) as refusal:
            read_market([good, path])
        assert rule in str(refusal.value)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="spot_usd_per_h=-1.0: "):
        read_market([good], spot_usd_per_h=-1.0)


@pytest.mark.parametrize(
    "words", [["--on-demand-usd", "0"], ["--gang-size", "1" * 30], ["--spot-usd", "nan"]]
)
def test_numbers_that_make_no_sense_are_refused(words, capsys):
    assert main(["simulate", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{words[0]}=") and err.count("\n") == 1


def test_a_markov_market_keeps_its_means():
    market = markov_market(0, 40_000, [2.0, 6.0], [2.0, 1.0], gap_s=600.0, num_nodes=3)
    up = market.nodes > 0
    assert set(np.unique(market.nodes)) == {0, 3}
    assert up.mean(0) == pytest.approx([0.5, 6 / 7], abs=0.03)
    lost_per_h = (up[:-1] & ~up[1:]).sum(0) / (up.sum(0) * market.gap_h)
    assert lost_per_h == pytest.approx([1 / 2, 1 / 6], rel=0.1)
    again = markov_market(0, 40_000, [2.0, 6.0], [2.0, 1.0], gap_s=600.0, num_nodes=3)
    assert (again.nodes == market.nodes).all()


def test_durations_are_rounded_to_the_safe_side():
    market = markov_market(0, 10, [1.0], [1.0], gap_s=195.0)
    terms = Terms.of(Job(1.0, 1.5, restart_h=0.1, checkpoint_interval_h=0.0), market)
    assert (terms.work, terms.deadline) == (19, 27)  # 18.5 and 27.7 ticks
    assert (terms.restart, terms.interval) == (2, 1)
    assert Terms.of(Job(1.0, 1.5, checkpoint_interval_h=1e9), market).interval == 19  # at the end
    with pytest.raises(ConfigError, match="deadline_h=0.9"):
        Job(1.0, 0.9)
    with pytest.raises(ConfigError, match="ticks of 195 s"):
        Terms.of(Job(1.0, 1.05, restart_h=0.05), market)


def test_every_tick_is_paid_and_a_start_computes_nothing():
    job = Job(2.0, 4.0, gang_size=2, restart_h=1.0, checkpoint_interval_h=1.0)
    outcome = simulate(hourly([[2] * 4]), job, Scripted(*[[SPOT]] * 3))
    assert outcome.finish_h == 3.0
    assert outcome.cost_usd == pytest.approx(3 * 2 * 0.25)
    assert (outcome.starts, outcome.restart_h, outcome.spot_h) == (1, 1.0, 3.0)


def test_a_preemption_loses_what_is_not_saved():
    policy = Scripted([SPOT], [SPOT], [SPOT], [SPOT], [SPOT], [SPOT], [SPOT])
    job = Job(5.0, 7.0, restart_h=0.0, checkpoint_interval_h=2.0)
    outcome = simulate(hourly([[1, 1, 1, 0, 1, 1, 1]]), job, policy)
    assert policy.views[2].left_if_lost == 3  # at 3 h of progress only 2 are saved
    assert policy.views[1].left_if_lost == 3  # at 2 h all of them are
    assert policy.views[3].preempted == SPOT and policy.views[3].place is None
    assert policy.views[3].work_left == 3
    assert policy.views[4].refused == [SPOT]
    assert (outcome.preemptions, outcome.lost_h, outcome.idle_h) == (1, 1.0, 1.0)
    assert outcome.finish_h == 7.0


def test_leaving_by_itself_saves():
    policy = Scripted([SPOT], [ON_DEMAND], [ON_DEMAND])
    job = Job(3.0, 3.0, restart_h=0.0, checkpoint_interval_h=3.0)
    outcome = simulate(hourly([[1, 0, 0]]), job, policy)
    assert outcome.preemptions == 1 and not outcome.met_deadline  # too late to leave
    policy = Scripted([SPOT], [ON_DEMAND], [ON_DEMAND])
    outcome = simulate(hourly([[1, 1, 0]]), job, policy)
    assert outcome.met_deadline and outcome.lost_h == 0.0
    assert outcome.cost_usd == pytest.approx(0.25 + 2)


def test_only_another_region_costs_egress():
    market = [[1] * 4, [1] * 4]
    job = Job(4.0, 4.0, restart_h=0.0, checkpoint_gb=30.0)
    there_and_back = [[SPOT], [OTHER], [OTHER], [SPOT]]
    outcome = simulate(hourly(market), job, Scripted(*there_and_back))
    assert (outcome.migrations, outcome.egress_usd) == (2, pytest.approx(2 * 30 * 0.1))
    assert outcome.cost_usd == pytest.approx(4 * 0.25 + 6.0)
    outcome = simulate(hourly(market, regions=("r", "r")), job, Scripted(*there_and_back))
    assert (outcome.migrations, outcome.starts, outcome.egress_usd) == (0, 3, 0.0)


def test_a_gang_is_whole_or_not_at_all():
    policy = Scripted([SPOT, OTHER], [SPOT, OTHER])
    outcome = simulate(hourly([[3, 3], [4, 3]]), Job(1.0, 2.0, 4, restart_h=1.0), policy)
    assert (outcome.preemptions, outcome.idle_h) == (1, 1.0)
    assert policy.views[1].refused == [SPOT]


def test_prices_may_change_every_tick():
    policy = Scripted([SPOT], [SPOT], [SPOT])
    market = hourly([[1, 1, 1]], spot_usd=[[0.1, 0.2, 0.4]])
    outcome = simulate(market, Job(3.0, 3.0, restart_h=0.0), policy)
    assert outcome.cost_usd == pytest.approx(0.7)
    assert [view.spot_usd_per_h for view in policy.views] == [[0.1], [0.2], [0.4]]


def test_a_market_that_ends_too_early_is_refused():
    with pytest.raises(ConfigError, match="2 ticks before the deadline"):
        simulate(hourly([[1] * 4]), Job(3.0, 5.0, restart_h=0.0), Scripted(), first_tick=1)
