"""The ledger adds up whatever became of the machines; what is read from it."""

import json

import pytest

from core.errors import ConfigError, DamagedError
from launch.__main__ import main
from launch.budget.deadline import DeadlineWatch
from launch.budget.ledger import Ledger, account_of, read_account
from launch.budget.prices import gpu_here, parse_prices, price_here
from launch.budget.progress import Progress, longest_save_s, read_progress, saved_step
from launch.budget.summary import forecast_usd, summary


def write_start(folder, place, sums, *, tokens=(), is_spot=True, usd_per_h=2.0, first_tokens=0):
    ledger = Ledger(folder)
    ledger.write(
        "start",
        0,
        place=place,
        usd_per_h=usd_per_h,
        nodes=1,
        is_spot=is_spot,
        tokens=first_tokens,
        machine="",
        machine_s=0.0,
    )
    for i, usd in enumerate(sums):
        seen = tokens[i] if tokens else 0
        ledger.write("tick", i, seconds=3600 * usd / usd_per_h, usd=usd, tokens=seen)
    return ledger


def test_starts_of_several_machines_add_up(tmp_path):
    Ledger(tmp_path).write("estimate", 0, usd=10.0, p50_h=4.0, p95_h=6.0, tokens=4e6)
    write_start(tmp_path, "aws/a", [1.0, 2.0], tokens=[0, 1e6])  # killed: its last tick is paid
    second = write_start(tmp_path, "gcp/b", [1.0, 3.0], tokens=[1e6, 2e6], first_tokens=8e5)
    second.write("end", 9, seconds=3600.0, usd=2.0, tokens=2e6, reason="ended")
    account = read_account(tmp_path)
    assert account.spent_usd == 4.0 and account.seconds == 7200.0
    assert [start.reason for start in account.starts] == ["", "ended"]
    assert account.usd_per_million_tokens == 2.0
    assert forecast_usd(account) == 8.0
    write_start(tmp_path / "more", "aws/a", [1.0], tokens=[1e6])
    write_start(tmp_path / "more", "aws/a", [1.0])  # a stage that trains on nothing
    assert read_account(tmp_path / "more").usd_per_million_tokens == 2.0

    text = summary(tmp_path)
    assert "spent      $4.00 in 2 starts, 2h00m paid" in text
    assert "estimate   $10.00, done in 4h00m to 6h00m" in text
    assert "forecast   $8.00 (-20% of the estimate)" in text
    assert "tokens     2.0M, $2.00 a million, expected $2.50" in text
    assert "aws/a spot      1       1   1.00  2.00  $2.00" in text


def test_a_start_comes_after_one_whose_clock_was_ahead(tmp_path, monkeypatch):
    now_ns = 1_700_000_000 * 10**9
    for hours_ahead, tokens in ((1, 1e6), (0, 2e6), (0, 3e6)):
        ahead_ns = now_ns + hours_ahead * 3600 * 10**9
        monkeypatch.setattr("launch.budget.ledger.time.time_ns", lambda ns=ahead_ns: ns)
        write_start(tmp_path, "aws/a", [1.0], tokens=[tokens])
    assert [start.tokens for start in read_account(tmp_path).starts] == [1e6, 2e6, 3e6]


def test_lines_that_are_torn_or_lost_take_nothing_with_them(tmp_path):
    ledger = write_start(tmp_path, "aws/a", [1.0, 2.0, 3.0])
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1], "\x00\x00\n", lines[3], lines[3][:20]]))
    assert ledger.account().spent_usd == 3.0
    assert "unreadable 2 lines" in summary(tmp_path)
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize("usd", ["-1.0", "NaN", '"NaN"', "Infinity", "null"])
def test_a_sum_that_cannot_be_is_damage(tmp_path, usd):
    write_start(tmp_path, "aws/a", [1.0, 2.0])
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(path.read_text().replace('"usd": 2.0', f'"usd": {usd}'))
    with pytest.raises(DamagedError, match=rf"ledger={path}: line 3: usd=.*; restore"):
        read_account(tmp_path)


def test_no_start_writes_to_another_ones_file(tmp_path):
    write_start(tmp_path, "aws/a", [1.0])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_start(tmp_path, "aws/a", [1.0])
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_ledger(tmp_path):
    assert read_account(tmp_path / "none").spent_usd == 0
    assert account_of([[{"entry": "tick", "usd": 5.0, "step": 1}]]).starts == ()
    with pytest.raises(ConfigError, match="has no entry"):
        summary(tmp_path)


PRICES = [
    {"cloud": "aws", "region": "r1", "zone": "r1a", "gpu": "H100", "is_spot": True, "usd_per_h": 3},
    {"cloud": "aws", "region": "r1", "zone": "r1b", "gpu": "H100", "is_spot": True, "usd_per_h": 4},
    {"cloud": "aws", "region": "r1", "zone": "r1b", "gpu": "A100", "is_spot": True, "usd_per_h": 2},
    {"cloud": "lambda", "region": "r2", "zone": None, "gpu": "H100", "usd_per_h": 9},
]


@pytest.mark.parametrize(
    ("info", "usd_per_h", "remark"),
    [
        ({"cloud": "AWS", "region": "r1", "zone": "r1a"}, 3, None),
        ({"cloud": "AWS", "region": "r1", "zone": "r1b"}, 4, "2 prices for AWS/r1/r1b"),
        ({"cloud": "AWS", "region": "r1", "zone": None}, 4, "3 prices for AWS/r1"),
        ({"cloud": "Lambda", "region": "r2", "zone": None}, 9, None),
        ({"cloud": "GCP", "region": "r1", "zone": "r1a"}, 9, "no price for GCP/r1/r1a"),
        (None, 9, "no price for an unknown place"),
    ],
)
def test_the_price_is_that_of_the_place_else_the_dearest(info, usd_per_h, remark):
    prices = parse_prices("--prices", json.dumps(PRICES))
    environment = {"SKYPILOT_CLUSTER_INFO": json.dumps(info)} if info else {}
    price, said = price_here(prices, environment)
    assert price.usd_per_h == usd_per_h
    assert (said is None) if remark is None else said.startswith(remark)


@pytest.mark.parametrize(
    ("count", "gpu", "usd_per_h", "remark"),
    [
        ("4", None, 6.84, None),
        ("8", "H100", 9.0, None),
        ("8", None, 13.68, "2 prices for Verda/FIN-01: "),
        (None, "B200", 13.68, "3 prices for Verda/FIN-01"),
        ("1", "L4", 13.68, "4 prices for Verda/FIN-01"),  # not of the list: nothing is told apart
    ],
)
def test_prices_of_one_place_are_told_apart_by_its_gpus(count, gpu, usd_per_h, remark):
    sizes = [("B200", 2, 3.42), ("B200", 4, 6.84), ("B200", 8, 13.68), ("H100", 8, 9.0)]
    rows = [
        {"cloud": "verda", "gpu": name, "gpus_per_node": n, "is_spot": True, "usd_per_h": usd}
        for name, n, usd in sizes
    ]
    environment = {"SKYPILOT_CLUSTER_INFO": '{"cloud": "Verda", "region": "FIN-01"}'}
    if count is not None:
        environment["SKYPILOT_NUM_GPUS_PER_NODE"] = count
    price, said = price_here(parse_prices("--prices", json.dumps(rows)), environment, gpu)
    assert price.usd_per_h == usd_per_h
    assert (said is None) if remark is None else said.startswith(remark)


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ("GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0a1b)", "H100"),
        ("GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0a1b)", "A100-80GB"),
        ("GPU 0: NVIDIA B200 (UUID: GPU-0a1b)\nGPU 1: NVIDIA B200 (UUID: GPU-2)", "B200"),
        ("NVIDIA-SMI has failed", None),
    ],
)
def test_the_driver_names_the_gpus(listed, name, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{listed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_here() == name
    program.unlink()
    assert gpu_here() is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[1]", '[{"cloud": "aws"}]', '[{"usd_per_h": -1}]']
)
def test_prices_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="SPOTFORGE_PRICES="):
        parse_prices("SPOTFORGE_PRICES", text)


def test_a_deadline_turns_and_recovers_once():
    watch = DeadlineWatch(deadline=1000.0, is_late=False, first_sight=None, first_tokens=50)
    total = 1050.0
    assert watch.look(90.0, Progress(0, 50, total)) is None  # not a step of this start yet
    assert watch.look(100.0, Progress(1, 60, total)) is None
    assert watch.look(200.0, Progress(2, 260, total)) is None  # 2 a second: done at 595
    said = watch.look(500.0, Progress(3, 300, total))  # 0.6 a second: at 1750
    assert said == "the deadline will be missed by 12m30s at this rate"
    assert watch.look(510.0, Progress(3, 300, total)) is None
    assert watch.look(600.0, Progress(4, 600, total)) is None  # at 1017
    assert watch.look(610.0, Progress(4, 620, total)) is None  # at 1001
    assert "after all, 2m44s early" in watch.look(650.0, Progress(5, 800, total))
    assert watch.look(651.0, Progress(5, 801, total)) is None
    assert "missed by 1s" in watch.look(1001.0, Progress(5, 801, None))
    assert watch.look(1100.0, Progress(9, 1050, total)) is None


def test_progress_is_read_from_the_run_directory(tmp_path):
    assert read_progress(None) == read_progress(tmp_path) == Progress()
    assert saved_step(None) is saved_step(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 10, "num_tokens": 1000}\n{"step": 20, "num_tokens": 2000}\n{"step": 30, "num'
    )
    assert read_progress(tmp_path) == Progress(20, 2000.0, None)
    (tmp_path / "status.json").write_text('{"status": "running", "total_steps": 100}')
    assert read_progress(tmp_path) == Progress(20, 2000.0, 10000.0)
    for name in ("step-00000010", "step-00000020", ".staging-step-00000030"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_step(tmp_path) == 20
    events = [
        {"time": 1.0, "event": "checkpoint", "step": 1, "blocking_s": 1.0, "write_s": 30.0},
        {"time": 1.0, "event": "checkpoint", "step": 2, "blocking_s": 1.0, "write_s": 9.0},
        {"time": 1.0, "event": "upload", "step": 1, "upload_s": 60.0},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert longest_save_s(tmp_path) == 91.0


def test_cost_shows_a_ledger_and_refuses_a_folder_without_one(tmp_path, capsys):
    ledger = Ledger(tmp_path / "ledger")
    ledger.write("start", 0, place="aws/ap-south-1", usd_per_h=2.0, nodes=1, is_spot=True, tokens=0)
    ledger.write("tick", 10, seconds=1800, usd=1.0, tokens=4e6)
    assert main(["cost", str(ledger.folder)]) == 0
    shown = capsys.readouterr().out
    assert "spent      $1.00 in 1 start" in shown and "4.0M, $0.25 a million" in shown
    assert main(["cost", str(tmp_path / "nothing")]) == 2
    assert "has no entry" in capsys.readouterr().err
