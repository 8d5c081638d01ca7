"""Plans: what is ranked, what is rejected and why, and that they are pure."""

import datetime
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import ConfigError
from launch.__main__ import main
from launch.catalog.catalog import Catalog
from launch.catalog.snapshot import write_snapshot
from launch.plan.planner import make_plan
from launch.plan.report import as_json, table
from launch.settings import compose_settings
from tests.launch.offers import offer
from tests.words import last_of_each

ROOT = Path(__file__).parents[3]
DATE = datetime.date(2026, 6, 1)
JOB = (
    "model=llama_8b",
    "model.vocab_size=128256",
    "parallel=fsdp",
    "precision=bf16",
    "global_batch_size=512",
    "micro_batch_size=1",
    "data.max_seq_len=4096",
    "activation_checkpointing=true",
    "stop.steps=1000",
)


def planned(offers, *words):
    catalog = Catalog("test", DATE, 0, "sha256:0", tuple(offers))
    return make_plan(compose_settings(last_of_each([*JOB, "launch.nodes=[1]", *words])), catalog)


def reasons(plan):
    return {(r.offer.place, r.offer.gpu): r.reason for r in plan.rejected}


def test_the_cheapest_in_all_comes_first_and_the_sum_is_its_parts():
    dear, cheap = offer(usd_per_h=40.0), offer(usd_per_h=20.0, region="us-west-2")
    plan = planned([dear, cheap])
    assert [c.offer for c in plan.candidates] == [cheap, dear]
    best = plan.candidates[0]
    tokens = 1000 * 512 * 4096
    assert best.compute_h == pytest.approx(tokens / best.tokens_per_s / 3600)
    assert best.costs.compute_usd == pytest.approx(20.0 * best.compute_h)
    assert best.costs.waste_usd > 0 and best.p50_h >= best.compute_h


def test_spot_that_is_lost_often_costs_more_than_its_price():
    spot = offer(usd_per_h=10.0, is_spot=True)
    calm, rough = (
        planned([spot], f"launch.preemption_hours={{aws:{hours}}}").candidates[0]
        for hours in (24, 1)
    )
    assert rough.costs.total_usd > calm.costs.total_usd
    assert rough.p95_h > calm.p95_h and rough.preemptions > 10 * calm.preemptions
    assert planned([spot, offer(usd_per_h=9.0)]).candidates[0].offer.is_spot is False


def test_rates_of_a_place_are_looked_up_from_the_narrowest():
    spot = offer(is_spot=True, zone="us-east-1c")
    hours = "launch.preemption_hours={aws:24,aws/us-east-1:12,aws/us-east-1/us-east-1c:6}"
    narrow = planned([spot], hours).candidates[0]
    wide = planned([offer(is_spot=True, zone="us-east-1b")], hours).candidates[0]
    assert narrow.preemptions > 1.5 * wide.preemptions


def test_rejections_say_why():
    offers = [
        offer(gpu="T4", gpus_per_node=1, region="a"),
        offer(region="b", gpu="H100"),
        offer(cloud="gcp", region="c"),
        offer(region="ap-south-1"),
        offer(region="d", is_spot=True),
        offer(region="e", gpu="A40"),
    ]
    plan = planned(
        offers,
        "launch.quotas={aws/b:4}",
        "launch.clouds=[aws]",
        "launch.spot=never",
        "launch.regions=[ap-south-1,a,b,d,e]",
        "launch.gpus=[H100,T4,A40]",
    )
    assert [c.offer.region for c in plan.candidates] == ["ap-south-1"]
    assert reasons(plan) == {
        ("aws/a", "T4"): "memory",
        ("aws/b", "H100"): "quota",
        ("gcp/c", "H100"): "cloud",
        ("aws/d", "H100"): "spot",
        ("aws/e", "A40"): "speed",
    }


def test_gpus_are_named_in_any_case():
    plan = planned([offer(), offer(gpu="B200")], "launch.gpus=[h100]")
    assert {c.offer.gpu for c in plan.candidates} == {"H100"}


def test_a_list_without_offers():
    with pytest.raises(ConfigError, match="^launch.catalog=test: has no offers; give another list"):
        planned([])


def test_several_nodes_only_where_they_can_be_had_together():
    plan = planned([offer(max_nodes=1), offer(region="us-west-2")], "launch.nodes=[1,2]")
    assert sorted((c.offer.region, c.num_nodes) for c in plan.candidates) == [
        ("us-east-1", 1),
        ("us-west-2", 1),
        ("us-west-2", 2),
    ]
    assert plan.rejected[0].reason == "nodes"


def test_nothing_in_time_or_within_the_budget_is_one_line_with_the_way_out():
    with pytest.raises(ConfigError) as late:
        planned([offer()], "launch.deadline=1h")
    hours = float(re.search(r"set ([\d.]+)h", str(late.value))[1])
    assert planned([offer()], f"launch.deadline={hours}h").candidates
    with pytest.raises(ConfigError) as dear:
        planned([offer()], "launch.budget_usd=5")
    usd = float(re.search(r"costs \$([\d,.]+\d)", str(dear.value))[1].replace(",", ""))
    assert planned([offer()], f"launch.budget_usd={usd}").candidates
    with pytest.raises(ConfigError, match="memory.*needs .*micro_batch_size"):
        planned([offer(gpu="T4", gpus_per_node=1)])
    with pytest.raises(ConfigError, match=r"launch.regions=\['india'\]: .*aws/us-east-1 is in US"):
        planned([offer()], "launch.regions=[india]")


def test_egress_and_storage_count():
    words = ["launch.data_region=aws/ap-south-1", "launch.data_gb=10000"]
    far, near = offer(), offer(region="ap-south-1", usd_per_h=21.0)
    plan = planned([far, near], *words)
    assert plan.candidates[0].offer == near
    assert plan.candidates[0].costs.egress_usd == 0
    assert plan.candidates[1].costs.egress_usd == pytest.approx(860)
    assert plan.candidates[0].costs.storage_usd > 0
    moved = planned([far], "launch.checkpoint_region=aws/ap-south-1").candidates[0]
    assert moved.costs.egress_usd == pytest.approx(moved_gb() * 0.086)


def moved_gb():
    return 12 * 8_030_261_248 / 1e9


def test_a_pool_costs_what_it_says():
    pool = offer(cloud="", pool="lab", pool_kind="slurm", region="", usd_per_h=3.0, max_nodes=1)
    best = planned([offer(), pool]).candidates[0]
    assert best.offer.pool == "lab"
    assert best.costs.egress_usd == best.costs.storage_usd == 0


RESULT = {
    "gpu": "H100",
    "num_gpus": 8,
    "tokens_per_s": 12345.0,
    "num_parameters": 8_030_261_248,
    "seq_len": 4096,
    "precision": "bf16",
    "strategy": "fsdp",
}


def test_measured_speed_beats_the_model(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    (tmp_path / "0.json").write_text('{"config": {}}')
    (tmp_path / "b.json").write_text(json.dumps(RESULT | {"seq_len": 8192, "tokens_per_s": 1.0}))
    best = planned([offer()], f"launch.measured=['{tmp_path}/*.json']").candidates[0]
    assert best.tokens_per_s == 12345.0 and best.speed_source == f"measured: {tmp_path}/a.json"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "launch.measured=.*/\\*.json: .*`gpu`"),
        (5, "launch.measured=.*/\\*.json: .*`gpu`"),
        ({"config": {}}, "launch.measured=.*/\\*.json: .*`gpu`"),
        ({"gpu": "H100"}, "gpu, num_gpus, tokens_per_s, num_parameters"),
        (RESULT | {"tokens_per_s": None}, "gpu, num_gpus, tokens_per_s"),
        (RESULT | {"tokens_per_s": -1, "seq_len": 1}, "tokens_per_s=-1.0 must be"),
        (RESULT | {"gpu": "H1000"}, "gpu=H1000: "),
    ],
)
def test_a_measurement_that_is_none(tmp_path, row, said):
    (tmp_path / "c.json").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=said):
        planned([offer()], f"launch.measured=['{tmp_path}/*.json']")


def test_the_network_holds_up_nodes_without_a_fast_one():
    one, two = planned([offer()], "launch.nodes=[1,2]", "global_batch_size=16").candidates
    assert {one.num_nodes, two.num_nodes} == {1, 2}
    slow = max((one, two), key=lambda c: c.num_nodes)
    assert "held up by the network" in slow.speed_source
    assert slow.tokens_per_s < 2 * min((one, two), key=lambda c: c.num_nodes).tokens_per_s
    words = ["launch.nodes=[2]", "global_batch_size=16", "launch.network_gbit=3200"]
    assert planned([offer()], *words).candidates[0].tokens_per_s > 2 * slow.tokens_per_s


def test_a_run_that_only_the_clock_ends_is_refused():
    with pytest.raises(ConfigError, match="set stop.tokens or stop.steps"):
        planned([offer()], "stop.steps=null", "stop.minutes=5")


def test_rupees_with_gst():
    usd = table(planned([offer()]), 1, False)
    inr = table(planned([offer()], "launch.currency=inr", "launch.usd_inr=100"), 1, False)
    dollars = float(re.search(r"^  1 +([\d,.]+)", usd, re.M)[1].replace(",", ""))
    rupees = float(re.search(r"^  1 +([\d,.]+)", inr, re.M)[1].replace(",", ""))
    assert rupees == pytest.approx(dollars * 118, rel=0.01)


def test_rupees_on_a_terminal_without_their_sign():
    command = [sys.executable, "-W", "error", "-m", "launch", "plan", *JOB, "--today=2026-06-01"]
    command += ["launch.currency=inr", 'run.name="\u00e9"']
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.startswith(b"\\xe9: ") and b" INR /job" in done.stdout


def many_offers(count):
    gpus = ["H100", "A100-80GB", "L40S", "B200", "V100"]
    return [
        offer(zone=f"z{i}", gpu=gpus[i % 5], usd_per_h=5 + i % 97, is_spot=i % 2 == 0)
        for i in range(count)
    ]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    path = tmp_path / "snapshot.json"
    write_snapshot(path, DATE, "test", many_offers(100))
    command = [sys.executable, "-m", "launch", "plan", *JOB, f"launch.catalog={path}"]
    command += ["--today", "2026-06-01", "--json"]
    first, second = (
        subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},  # the order of sets of strings
            capture_output=True,
            check=True,
        ).stdout
        for seed in "12"
    )
    assert first == second
    found = json.loads(first)
    assert len(found["candidates"]) + len(found["rejected"]) == 100 * 4


def test_five_times_as_many_offers_take_about_five_times_as_long():
    settings = compose_settings([*JOB, "launch.nodes=[1]"])  # which takes longer than planning

    def seconds(count):
        catalog = Catalog("test", DATE, 0, "sha256:0", tuple(many_offers(count)))
        begin = time.process_time()
        assert len(make_plan(settings, catalog).candidates) > count / 2
        return time.process_time() - begin

    least = {count: min(seconds(count) for _ in range(3)) for count in (1000, 5000)}
    assert least[5000] < 15 * least[1000]  # what grows with the square would take 25 times


def test_a_plan_never_changes():
    """Golden, on every Python: another figure is another choice, or another price."""
    offers = [
        offer(zone="a", is_spot=True, usd_per_h=9.87),
        offer(gpu="A100-80GB", usd_per_h=13.1, region="us-west-2"),
        offer(region="ap-south-1", usd_per_h=21.3),
    ]
    words = ["launch.nodes=[1,2]", "launch.data_region=aws/ap-south-1", "launch.data_gb=123.4"]
    assert [
        (c.offer.region, c.num_nodes, f"{c.costs.total_usd:.9g}", f"{c.p95_h:.9g}")
        for c in planned(offers, *words).candidates
    ] == [
        ("us-east-1", 1, "124.321641", "13.8796281"),
        ("ap-south-1", 1, "232.940582", "10.9266627"),
        ("us-west-2", 1, "462.245148", "34.4364833"),
        ("us-east-1", 2, "480.069966", "29.5636133"),
        ("us-west-2", 2, "592.527491", "22.1925498"),
        ("ap-south-1", 2, "946.040757", "22.1925498"),
    ]


def test_json_and_table_hold_the_same_ranking():
    plan = planned([offer(), offer(region="us-west-2", usd_per_h=19.0)])
    found = json.loads(as_json(plan))
    assert [c["offer"]["region"] for c in found["candidates"]] == ["us-west-2", "us-east-1"]
    shown = table(plan, 5, False)
    assert shown.index("us-west-2") < shown.index("us-east-1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch.deadline=36"], "launch.deadline=36: "),
        (["launch.budget_usd=-1"], "launch.budget_usd=-1.0: must be from 0.001"),
        (["stop.tokens=-1"], "stop.tokens=-1: must be above 0"),
        (["global_batch_size=0", "stop.tokens=9"], "global_batch_size=0: must be above 0"),
        (["schedule.warmup_steps=9", "stop.steps=9"], "schedule.warmup_steps=9: must be shorter"),
        (["launch.gpus=[H10]"], "launch.gpus=H10: "),
        (["launch.colour=red"], "launch.colour=red: there is no such key"),
        (["launch.stages=[compress,train]"], "launch.stages=[compress,train]: "),
        (["launch.mfu=1e-300"], "launch.mfu=1e-300: must be from 0.001"),
        (["launch.wait_minutes=1e300"], "launch.wait_minutes=1e+300: must be from 0 to"),
        (["launch.deadline=99999999999d"], "launch.deadline=99999999999d: "),
        (
            ["model=pretrained", "model.path=path/to/model"],
            "model.path=path/to/model: has no config.json",
        ),
        (
            ["model=pretrained", "model.path=/etc/passwd"],
            "model.path=/etc/passwd: has no config.json",
        ),
        (["--today", "soon"], "argument --today: 'soon'"),
        (["modle=tiny"], "did you mean model?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, said, capsys):
    try:
        code = main(["plan", *words, *([] if "--today" in words else ["--today", "2026-06-01"])])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1
