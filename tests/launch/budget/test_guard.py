"""The guard as a process: it pays, stops in time, passes signals on, and leaves nobody behind."""

import json
import os
import re
import signal
import sys
import time

import pytest

from core.folder import append_line
from launch.budget.ledger import read_account
from tests.launch.budget.conftest import Site, end


def wait_for(condition, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def guard_until_it_worked(site, budget_usd, *options, stand_in=(), events=()):
    """Has the guard stop its command after two seconds, which cost a dollar each.

    A machine that needs longer to start the command gets more, in folders of their own.

    Returns:
        The site, the budget, and the guard's exit code and words.
    """
    for more_usd in (0, 6, 30, 120):
        one = Site(site.folder / f"and-{more_usd}")
        one.run_dir.mkdir(parents=True)
        for event in events:
            append_line(one.run_dir / "events.jsonl", json.dumps(event))
        command, budget = one.stand_in(*stand_in), budget_usd + more_usd
        code, said = end(one.guard("--budget-usd", budget, *options, command=command))
        if (one.run_dir / "heard").exists():
            return one, budget, code, said
    raise AssertionError(f"it was told to stop before it was there: {said}")


def test_at_the_budget_it_saves_and_ends_and_goes_on_with_more(site):
    # A second is a dollar: it works for two of them, and may take 30 to stop.
    site, budget_usd, code, said = guard_until_it_worked(site, 32, "--stop-s", 30)
    assert code == 2
    first = read_account(site.ledger)
    step = first.starts[-1].step
    assert budget_usd - 30.2 < first.spent_usd < budget_usd
    assert (site.run_dir / "checkpoints" / f"step-{step:08d}").is_dir()
    line = said.splitlines()[-1]
    assert line == (
        f"launch.budget_usd={budget_usd}: ${first.spent_usd:.2f} are spent and the run is saved "
        f"at step {step}; raise it and run the same command"
    )

    # Again with nothing left: refused, and the command is not started
    os.unlink(site.run_dir / "pid")
    code, said = end(site.guard("--budget-usd", budget_usd, "--stop-s", 31))
    assert code == 2 and "a tick and a save here cost $31.10; raise it to " in said
    needed = float(re.search(r"raise it to ([\d.]+)", said)[1])
    assert 0 <= needed - read_account(site.ledger).spent_usd - 31.1 <= 0.011
    assert not (site.run_dir / "pid").exists()

    more_usd = first.spent_usd + budget_usd
    code, said = end(site.guard("--budget-usd", more_usd, "--stop-s", 30))
    account = read_account(site.ledger)
    assert code == 2 and account.starts[-1].step > step
    assert first.spent_usd < account.spent_usd < more_usd
    assert [start.reason for start in account.starts] == [
        "stopped at the budget",
        "refused",
        "stopped at the budget",
    ]
    assert account.tokens == 1000 * account.starts[-1].step


def test_a_save_that_is_too_slow_is_cut_at_the_budget(site):
    options = ("--stop-s", 0.3, "--tick-s", 0.5)
    stand_in = ("--save-s", "1000")
    site, budget_usd, code, said = guard_until_it_worked(site, 2.5, *options, stand_in=stand_in)
    assert code == 2 and "killed while saving" in said
    account = read_account(site.ledger)
    assert budget_usd <= account.spent_usd < 1000  # what the save alone would have cost
    assert not is_alive(int((site.run_dir / "pid").read_text()))


def test_a_slow_save_of_before_makes_it_stop_earlier(site):
    event = {"time": 1.0, "event": "checkpoint", "step": 1, "blocking_s": 20, "write_s": 40}
    options = ("--stop-s", 0.1)
    site, budget_usd, code, said = guard_until_it_worked(site, 92, *options, events=[event])
    assert code == 2 and "killed" not in said
    stopping = re.search(r"\$(\S+) are spent: stopping", said)
    assert float(stopping[1]) < budget_usd - 60  # by --stop-s alone it would be at least 91.8


@pytest.mark.parametrize("code", [0, 1, 2, 33])
def test_other_ends_are_the_commands_own(site, code):
    command = site.stand_in("--steps", "3", "--exit", code)
    assert end(site.guard("--budget-usd", 1000, command=command))[0] == code
    (start,) = read_account(site.ledger).starts
    assert start.reason == "ended" and start.tokens == 3000
    assert site.entries("end")[0]["exit"] == code


def test_without_a_budget_it_only_counts(site):
    command = site.stand_in("--steps", "60", "--until", site.folder / "go")
    guard = site.guard("--estimate", '{"usd": 3, "tokens": 6e4}', command=command)
    wait_for(lambda: len(site.entries("tick")) >= 4)
    (site.folder / "go").touch()
    assert end(guard)[0] == 0
    account = read_account(site.ledger)
    assert account.estimate.usd == 3 and account.spent_usd > 0.3
    ticks = [entry["usd"] for entry in site.entries("tick")]
    assert ticks == sorted(ticks) and len(ticks) >= 4
    assert account.usd_per_million_tokens == pytest.approx(account.spent_usd / 0.06)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_and_33_comes_back(site, number):
    guard = site.guard("--budget-usd", 1000)
    wait_for((site.run_dir / "pid").exists)
    wait_for(lambda: site.entries("tick"))
    guard.send_signal(number)
    assert end(guard)[0] == 33
    passed_on = signal.SIGTERM if number == signal.SIGHUP else number
    assert (site.run_dir / "told").read_text() == passed_on.name


def test_a_killed_guard_takes_the_command_with_it_and_its_tick_is_paid(site):
    guard = site.guard("--tick-s", "5", "--budget-usd", 1000)
    pid = int(
        wait_for(lambda: (site.run_dir / "pid").exists() and site.run_dir / "pid").read_text()
    )
    wait_for(lambda: site.entries("tick"))
    guard.kill()
    guard.communicate()
    wait_for(lambda: not is_alive(pid))
    (start,) = read_account(site.ledger).starts
    assert start.usd >= 5 and start.reason == ""


def test_it_leaves_nobody_behind(site, tmp_path):
    left = tmp_path / "left"
    script = f"sleep 60 & echo $! > {left}; exit 0"
    assert end(site.guard(command=["sh", "-c", script]))[0] == 0
    wait_for(lambda: not is_alive(int(left.read_text())))


def test_a_clock_that_is_set_makes_no_difference(site):
    """Seconds are those of a clock that nobody sets, and time between starts is not billed."""
    site.ledger.mkdir()
    (site.ledger / "00000000000000000001-aaaaaa.jsonl").write_text(
        json.dumps({"time": 9e9, "entry": "start", "step": 0, "usd_per_h": 1.0})
        + "\n"
        + json.dumps({"time": 1.0, "entry": "tick", "step": 0, "seconds": 3600, "usd": 1.0})
        + "\n"
        + '{"time": 2.0, "entry": "tick", "st'
    )
    command = site.stand_in("--steps", "3")
    assert end(site.guard("--budget-usd", 1000, "--stop-s", 1, command=command))[0] == 0
    account = read_account(site.ledger)
    assert 1 < account.spent_usd < 1000 and [start.usd for start in account.starts][0] == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("SKYPILOT_NODE_RANK", "1"), ("SKYPILOT_NODE_RANK", "abc"), ("SKYPILOT_NUM_NODES", "abc")],
)
def test_only_the_first_node_pays(site, name, value):
    code, said = end(site.guard("--budget-usd", 1, env={name: value}))
    assert code == 2 and said.startswith(f"{name}={value}: ") and len(said.splitlines()) == 1
    assert not site.ledger.exists() and not site.run_dir.exists()


def test_nodes_are_multiplied_and_prices_are_looked_up_by_place(site):
    prices = [
        {"cloud": "aws", "region": "ap-south-1", "zone": "", "gpu": "A100", "usd_per_h": 36.0},
        {"cloud": "gcp", "region": "us-east1", "zone": "", "gpu": "A100", "usd_per_h": 72.0},
    ]
    info = {"cluster_name": "c", "cloud": "AWS", "region": "ap-south-1", "zone": "ap-south-1b"}
    env = {
        "SPOTFORGE_PRICES": json.dumps(prices),
        "SKYPILOT_CLUSTER_INFO": json.dumps(info),
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "0",
    }
    assert end(site.guard(command=site.stand_in("--steps", "1"), env=env))[0] == 0
    (start,) = read_account(site.ledger).starts
    assert (start.place, start.usd_per_h, start.nodes) == ("aws/ap-south-1", 72.0, 2)


def test_the_time_since_boot_is_paid_for_once(site):
    options = ("--usd-per-h", "0.001", "--since-boot")
    command = site.stand_in("--steps", "2")
    for _ in range(2):
        assert end(site.guard(*options, command=command))[0] == 0
    first, second = read_account(site.ledger).starts
    assert first.machine == second.machine != ""
    assert first.seconds > second.seconds
    with open("/proc/uptime") as file:
        assert first.seconds + second.seconds <= float(file.read().split()[0])
    # Without a gap: the time between the two starts was paid for, too
    assert second.machine_s == pytest.approx(first.machine_s + first.seconds, abs=0.1)


def test_a_deadline_that_will_be_missed_is_said_once(site):
    command = site.stand_in("--steps", "100000")
    guard = site.guard("--deadline-h", 0.05, command=command)
    wait_for(lambda: len(site.entries("tick")) > 8)
    guard.terminate()
    code, said = end(guard)
    assert code == 33
    (alarm,) = site.entries("alarm")
    assert alarm["is_late"] and said.count("the deadline will be missed by") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ledger", "x"], "-- COMMAND"),
        (["--", "true"], "--ledger"),
        (["--ledger", "x", "--", "true"], "--usd-per-h, --prices or SPOTFORGE_PRICES"),
        (["--ledger", "", "--usd-per-h", "1", "--", "true"], "argument --ledger: ''"),
        (["--ledger", "x", "--usd-per-h", "-1", "--", "true"], "argument --usd-per-h: '-1'"),
        (["--ledger", "x", "--usd-per-h", "1", "--nodes", "0", "--", "true"], "--nodes=0"),
        (["--ledger", "x", "--usd-per-h", "1", "--budget-usd", "0", "--", "true"], "above 0"),
        (["--ledger", "x", "--usd-per-h", "1", "--", "no-such-program"], "no such program"),
        (["--ledger", "x", "--prices", "/none", "--", "true"], "--prices=/none"),
        (["--ledger", "/dev/null/x", "--usd-per-h", "1", "--", "true"], "--ledger=/dev/null/x"),
        (
            ["--ledger", "x", "--usd-per-h", "1", "--estimate", "{}]", "--", "true"],
            "--estimate={}]",
        ),
        (
            ["--ledger", "x", "--usd-per-h", "1", "--estimate", '{"inr": 2}', "--", "true"],
            "inr",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options, said, tmp_path, monkeypatch, capfd):
    from launch.__main__ import main

    monkeypatch.chdir(tmp_path)
    try:
        code = main(["guard", *options])
    except SystemExit as e:
        code = e.code
    assert code == 2
    err = capfd.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.long
def test_a_real_run_is_saved_at_the_budget_and_goes_on_with_more(site, small):
    small = [word for word in small if not word.startswith(("run.dir", "stop.steps"))]
    command = [sys.executable, "-m", "trainer", *small, f"run.dir={site.run_dir}"]
    command += ["stop.steps=1000000", "nproc=1"]

    def until_it_is_saved_after(step, budget_usd):
        while True:  # starting takes as long as the machine is slow
            guard = site.guard("--budget-usd", budget_usd, "--stop-s", 15, command=command)
            code, said = end(guard, 240)
            assert code == 2, said
            account = read_account(site.ledger)
            # Above it is only what killing takes.
            assert account.spent_usd <= budget_usd or "killed while saving" in said
            names = sorted(path.name for path in (site.run_dir / "checkpoints").glob("step-*"))
            if names and int(names[-1][5:]) > step:
                assert (site.run_dir / "checkpoints" / names[-1] / "manifest.json").is_file()
                return int(names[-1][5:]), account, said
            assert budget_usd < 300, said
            budget_usd *= 2

    step, account, said = until_it_is_saved_after(0, 30)
    assert f"the run is saved at step {step};" in said, said
    more, account, said = until_it_is_saved_after(step, account.spent_usd + 30)
    assert f"resuming after step {step}" in said or more > step
    assert account.tokens >= more * 8 * 32 * 0.5
