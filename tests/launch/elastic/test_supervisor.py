"""One machine: what the supervisor makes of ranks that finish, stop, refuse, fail and hang."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.launch.elastic.conftest import LONG, ROOT, Site, is_running, wait_until


def test_a_gang_that_finishes_is_not_talked_about(site, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    supervisor = site.supervise("--nproc", 2)
    assert supervisor.end() == 0
    assert supervisor.printed == ""
    assert site.checkpoint() == 5
    first, second = sorted(site.starts(), key=lambda start: start["rank"])
    threads = str(max(1, os.cpu_count() // 2))
    assert first | {"pid": 0, "gang": ""} == {
        "pid": 0,
        "gang": "",
        "rank": 0,
        "world_size": 2,
        "MASTER_ADDR": "127.0.0.1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "OMP_NUM_THREADS": threads,
    }
    assert (second["rank"], second["LOCAL_RANK"]) == (1, "1")
    assert [event["event"] for event in site.events()] == ["start", "finish"]
    assert site.events()[-1] | {"time": 0, "reason": ""} == {
        "time": 0,
        "event": "finish",
        "generation": 1,
        "world_size": 2,
        "step": 5,
        "reason": "",
    }


def test_a_refusal_is_final(site):
    supervisor = site.supervise("--nproc", 2, toy=["--echo", "--do", 1, 2, 2, 9])
    assert supervisor.end() == 2
    assert len(site.starts()) == 2
    assert not any(is_running(start["pid"]) for start in site.starts())
    assert supervisor.printed == ""  # the rank said what is wrong


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_makes_the_ranks_save(site, number):
    supervisor = site.supervise("--nproc", 2, toy=[*LONG, "--save-s", 0.3])
    site.wait_for_step(3)
    supervisor.send(number)
    supervisor.wait_for_line(f"{number.name}: stopping 2 ranks")
    supervisor.send(signal.SIGINT)  # impatience changes nothing
    assert supervisor.end() == 33
    assert site.checkpoint() >= 3
    assert site.events()[-1]["event"] == "stop"


def test_ranks_that_do_not_stop_in_time_are_killed(site):
    supervisor = site.supervise(
        "--nproc", 2, "--grace", 0.5, toy=[*LONG, "--deaf", 0, "--save-s", 60]
    )
    site.wait_for_step(2)
    supervisor.send()
    assert supervisor.end() == 1
    assert "rank 0 did not end within 0.5 s: killed" in supervisor.printed
    assert not any(is_running(start["pid"]) for start in site.starts())


def test_a_program_that_knows_no_signals_is_stopped_by_them(site):
    supervisor = site.launch("supervise", "--nproc", 2, "--", "sleep", "60")
    wait_until(lambda: len(children(supervisor)) == 2, lambda: supervisor.printed)
    supervisor.send()
    assert supervisor.end() == 33


def _signal_later(supervisor, delay_s):
    # From here on its handlers are there; before, no process is. On a busy machine all may be over.
    is_over = lambda: supervisor.process.poll() is not None  # noqa: E731
    wait_until(lambda: is_over() or children(supervisor), lambda: "no rank")
    time.sleep(delay_s)
    supervisor.send()


def test_a_signal_at_any_moment(tmp_path):
    """Before there are ranks, before they handle signals, in a step, in a save, at the end."""
    moments = random.Random(0)
    sites = []
    for i in range(10):
        folder = tmp_path / str(i)
        folder.mkdir()
        sites.append(Site(folder))
    try:
        # The first does not end by itself, so that there is one that the signal ends.
        ends = [["--steps", 100000], *(["--steps", 30] for _ in sites[1:])]
        running = [
            site.supervise(
                "--nproc", 2, "--grace", 100, toy=["--start-s", 0.2, *steps, "--save-s", 0.2]
            )
            for site, steps in zip(sites, ends, strict=True)
        ]
        # Each by a clock of its own: on a busy machine the first may end before the last begins.
        delays_s = [0.0, *(moments.uniform(0, 3) for _ in running[1:])]
        with ThreadPoolExecutor(len(running)) as pool:
            list(pool.map(_signal_later, running, delays_s))
        codes = [supervisor.end() for supervisor in running]
        assert set(codes) <= {0, 33}, [(s.printed, s.end()) for s in running]
        assert codes[0] == 33
        for site, code in zip(sites, codes, strict=True):
            assert code == 33 or site.checkpoint() == 30
    finally:
        for site in sites:
            site.close()


def children(running):
    pid = running.process.pid
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return file.read().split()
    except FileNotFoundError:
        return []


def test_a_machine_that_goes_away_says_why(site):
    supervisor = site.supervise("--nproc", 2, toy=["--do", 1, 3, "notice", 1])
    assert supervisor.end() == 33
    assert site.checkpoint() == 3
    assert "goes away: the cloud takes this machine" in supervisor.printed
    assert site.events()[-1]["event"] == "leave"


def test_a_rank_that_is_killed_is_started_again(site):
    supervisor = site.supervise("--nproc", 2, toy=["--echo", "--do", 1, 3, "kill", 1])
    assert supervisor.end() == 0
    assert "rank 1 died of SIGKILL at step 3; starting again in 0." in supervisor.printed
    assert "(1 failure without progress)" in supervisor.printed
    assert "start 2: 2 ranks on 1 node after step 3" in supervisor.printed
    assert [e["event"] for e in site.events()] == ["start", "fail", "start", "finish"]


def test_the_first_error_is_named_not_its_echo(site):
    supervisor = site.supervise("--nproc", 3, toy=["--echo", "--do", 1, 3, "error", 1])
    assert supervisor.end() == 0
    assert "rank 1 failed with exit code 1 at step 3: ValueError: bad value" in supervisor.printed
    assert "LostPeer" not in supervisor.printed


def test_peers_that_wait_for_a_dead_rank_are_killed(site):
    supervisor = site.supervise("--nproc", 2, toy=["--deaf", 0, "--do", 1, 3, "error", 1])
    supervisor.wait_for_line("rank 1 failed")
    assert not any(is_running(start["pid"]) for start in site.starts()[:2])
    assert supervisor.end() == 0


def test_the_same_error_three_times_ends_it(site):
    supervisor = site.supervise("--nproc", 1, toy=["--do", 0, 3, "error", 9])
    assert supervisor.end() == 1
    assert len(site.starts()) == 3
    assert supervisor.printed.count("Traceback (most recent call last)") == 1
    assert "giving up: the same error 3 times at step 3" in supervisor.printed.splitlines()[-1]
    assert site.events()[-1]["event"] == "crash_loop"


@pytest.mark.long
def test_a_hang_is_found_by_the_usual_steps(site):
    """The cap is ten minutes; steps take a fraction of a second."""
    toy = ["--steps", 60, "--do", 1, 40, "hang", 1]
    supervisor = site.supervise("--nproc", 2, toy=toy)
    assert supervisor.end() == 0
    silence_s = float(re.search(r"no rank beat for (\d+) s, usually", supervisor.printed)[1])
    assert silence_s < 600
    assert [e["event"] for e in site.events()] == ["start", "hang", "start", "finish"]


def test_a_hang_is_shown_and_after_three_it_ends(site):
    toy = ["--steps", 30, "--do", 1, 20, "hang", 9]
    supervisor = site.supervise("--nproc", 2, "--hang-timeout", 4, toy=toy)
    assert supervisor.end() == 1
    first = supervisor.printed.split("starting again")[0]
    assert "stacks of rank 0 on this machine, train 20:" in first
    assert " in meet\n" in first.split("stacks of rank 1")[0]
    assert " in happen\n" in first.split("stacks of rank 1")[1]
    assert re.search(r"no rank beat for \d+ s; rank ", first)
    assert "giving up: the same error 3 times at step 20" in supervisor.printed
    assert [e["event"] for e in site.events()] == ["start", "hang"] * 3 + ["crash_loop"]


def test_a_start_may_take_longer_than_a_step(site):
    limits = ["--hang-timeout", 0.3, "--startup-timeout", 100]
    supervisor = site.supervise("--nproc", 1, *limits, toy=["--step-s", 0.6])
    supervisor.wait_for_line(r"no rank beat for \d+ s; rank 0 is behind: train [2-9]")
    assert supervisor.printed.count("is behind") == 1, "the first step was taken for a hang"


def test_a_program_that_does_not_beat_is_not_watched(site):
    supervisor = site.launch(
        "supervise", "--hang-timeout", 0.1, "--startup-timeout", 0.1, "--", "sleep", "1"
    )
    assert supervisor.end() == 0
    assert supervisor.printed == ""


def test_ranks_die_with_the_supervisor(site):
    supervisor = site.supervise("--nproc", 2, toy=LONG)
    site.wait_for_step(2)
    supervisor.send(signal.SIGKILL)
    supervisor.end()
    pids = [start["pid"] for start in site.starts()]
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_running, pids)), lambda: "orphans")


def test_a_temporary_folder_may_be_cleared(site):
    toy = ["--echo", *LONG, "--do", 0, 5, "wait", 1, "--do", 0, 6, "kill", 1]
    supervisor = site.supervise("--nproc", 1, toy=toy)
    site.wait_for_step(4)
    (folder,) = site.folder.glob("spotforge-ranks-*")
    shutil.rmtree(folder)
    (site.folder / "go").touch()
    supervisor.wait_for_line("start 2: 1 rank on 1 node")
    supervisor.send()
    assert supervisor.end() == 33
    assert not folder.exists()


def test_a_program_that_cannot_be_started(site):
    program = site.folder / "program"
    program.write_text("not a program")
    program.chmod(0o755)
    supervisor = site.launch("supervise", "--", program)
    assert supervisor.end() == 1
    assert "rank 0 failed with exit code 127: cannot start" in supervisor.printed
    assert "giving up: the same error 3 times before its first step" in supervisor.printed


def test_what_a_rank_leaves_behind_is_killed(site):
    script = f"sleep 1000 & echo $! > {site.folder}/helper; exit 33"
    supervisor = site.launch("supervise", "--", "sh", "-c", script)
    assert supervisor.end() == 33
    assert "the ranks stopped, and none says why" in supervisor.printed
    helper = int((site.folder / "helper").read_text())
    wait_until(lambda: not is_running(helper), lambda: "the helper runs")


def test_events_wait_for_the_folder_and_never_make_it(site):
    events = site.folder / "run" / "events.jsonl"
    for folder, code in (("other", 0), ("run", 0)):
        script = f"sleep 0.1; mkdir {site.folder}/{folder}; sleep 0.2"
        supervisor = site.launch("supervise", "--events", events, "--", "sh", "-c", script)
        assert supervisor.end() == code
        assert events.exists() == (folder == "run")
    assert len(events.read_text().splitlines()) == 2


def test_a_gang_outlives_its_audience(site, real_programs):
    """Neither a broken pipe nor a full disk is a reason to end it."""
    script = f"test -e {site.folder}/again || {{ touch {site.folder}/again; kill -9 $$; }}"
    supervisor = site.launch("supervise", "--events", "/dev/full", "--", "sh", "-c", script)
    assert supervisor.end() == 0
    assert "--events=/dev/full cannot be written, and is given up" in supervisor.printed
    (site.folder / "again").unlink()
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "launch", "supervise", "--", "sh", "-c", script]
    assert subprocess.run(command, cwd=ROOT, stderr=write).returncode == 0
    os.close(write)
    assert (site.folder / "again").exists()


def test_a_gpu_that_is_lost_makes_the_gang_smaller(site):
    """As many ranks as the driver lists at each start."""
    gpus = site.folder / "gpus"
    gpus.write_text("GPU 0: H100 (UUID: GPU-0a)\nGPU 1: H100 (UUID: GPU-0b)\n")
    program = site.folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {gpus}\n")
    program.chmod(0o755)
    env = {"PATH": f"{site.folder}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1"}
    toy = ["--echo", *LONG, "--do", 1, 5, "wait", 1, "--do", 1, 6, "kill", 1]
    supervisor = site.supervise(toy=toy, env=env)
    site.wait_for_step(4)
    gpus.write_text("GPU 0: H100 (UUID: GPU-0a)\n")
    (site.folder / "go").touch()
    supervisor.wait_for_line("start 2: 1 rank on 1 node")
    supervisor.send()
    assert supervisor.end() == 33
