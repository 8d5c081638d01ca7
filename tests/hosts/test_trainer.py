"""The real trainer on machines of their own: who is left alone ends, and what was saved stays."""

import os
import re
import signal
import time

import pytest

from monitoring.goodput import goodput
from monitoring.run_files import read_run
from tests.hosts import real_trainer
from tests.hosts.real_trainer import Run
from tests.launch.elastic.conftest import wait_until

pytestmark = pytest.mark.hosts

# The promise is a minute; this machine is busy.
GONE_S = 75


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


@pytest.fixture
def start_ranks(folder, environment):
    """Starts ranks without a supervisor; returns the processes and their logs."""

    def start(hosts, more=None):
        started = []
        for rank, host in enumerate(hosts):
            env = {**environment, **real_trainer.place(rank, hosts), **(more or {}).get(host, {})}
            log = folder / f"rank-{rank}"
            with log.open("w") as output:
                words = real_trainer.command(folder)
                started.append((host.start(*words, output=output, env=env), log))
        return started

    return start


def test_ranks_with_other_software_end_with_one_line_each(bed, folder, environment, start_ranks):
    """As torchrun starts them, without a supervisor that would have refused the machine."""
    a, b = bed("a", "b").hosts
    installed = folder / "installed" / "numpy-9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.1\n")
    other = {"PYTHONPATH": os.pathsep.join([str(installed.parent), environment["PYTHONPATH"]])}
    for process, log in start_ranks([a, b], {b: other}):
        assert process.wait(120) == 2, log.read_text()
        (said,) = [line for line in log.read_text().splitlines() if "machine=b" in line]
        assert "Traceback" not in log.read_text(), log.read_text()
        assert "rank 1 has numpy 9.1, rank 0 on a numpy 2" in said
    assert not (folder / "run").exists()


def test_ranks_whose_peers_are_gone_end_within_a_minute(bed, folder, start_ranks):
    """gloo alone waits for half an hour, and nobody else is there to end them."""
    a, b = bed("a", "b").hosts
    started = start_ranks([a, b])
    wait_until(lambda: real_trainer.last_step(folder) >= 3, started[0][1].read_text)
    b.cut()
    cut_at = time.monotonic()
    for process, log in started:
        assert process.wait(300) == 1, log.read_text()
    assert time.monotonic() - cut_at < GONE_S
    said = "".join(log.read_text() for _, log in started)
    assert re.search(r"rank \d: the machine 10\.77\.0\.\d has not answered for 30 s", said)


def test_a_machine_that_is_cut_off_or_loses_its_agent_has_no_ranks_left(bed, folder, environment):
    made = bed("s", "a", "b")
    supervisor, a, b = made.hosts
    run = Run(folder, environment, supervisor, [a, b])
    run.wait_for_step(3)
    b.cut()
    wait_until(lambda: "lost the supervisor" in run.said("b"), lambda: run.said("b"))
    noticed_at = time.monotonic()
    wait_until(lambda: not b.ranks(), lambda: run.said("b"))
    assert time.monotonic() - noticed_at < GONE_S
    run.wait_for_line(r"start 2: 1 rank on 1 node")
    run.wait_for_step(run.last_step() + 3)
    assert a.ranks()
    run.agents["a"].kill()
    wait_until(lambda: not a.ranks(), lambda: run.said("a"))


def test_ranks_that_lose_their_supervisor_and_their_peers_end_within_a_minute(
    bed, folder, environment
):
    """The supervisor is killed, so that they would save; the peers are silent."""
    made = bed("s", "a", "b")
    supervisor, a, b = made.hosts
    run = Run(folder, environment, supervisor, [a, b], "checkpoint.interval=1")
    run.wait_for_step(3)
    a.lose(b)
    b.lose(a)
    run.supervisor.kill()
    for host in (a, b):
        wait_until(lambda host=host: "its ranks save" in run.said(host.name), lambda: run.printed)
    noticed_at = time.monotonic()
    for host in (a, b):
        wait_until(lambda host=host: not host.ranks(), lambda: run.printed)
    assert time.monotonic() - noticed_at < GONE_S


def test_a_supervisor_that_is_killed_at_random_moments_costs_nothing(bed, folder, environment):
    made = bed("s", "a", "b")
    problems = real_trainer.kill_supervisors(
        folder, environment, made.hosts, deaths=3, seed=1, tell=print
    )
    assert problems == []


def test_machines_whose_clocks_are_an_hour_apart(bed, folder, environment):
    """The first rank is on either; its events are of one clock, and so is the account of them."""
    supervisor, a, b = bed("s", "a", "b").hosts
    ahead = folder / "ahead"
    ahead.mkdir()
    (ahead / "sitecustomize.py").write_text(
        "import time\nnow, now_ns = time.time, time.time_ns\n"
        "time.time = lambda: now() + 3600\ntime.time_ns = lambda: now_ns() + 3600 * 10**9\n"
    )
    wrong = {"PYTHONPATH": os.pathsep.join([str(ahead), environment["PYTHONPATH"]])}
    began = time.time()
    run = Run(folder, environment, supervisor, [a])
    run.wait_for_step(3)
    run.join(b, wrong)
    run.wait_for_line("start 2: 2 ranks on 2 nodes")
    run.wait_for_step(run.last_step() + 3)
    run.agents["a"].kill()  # b has the first rank now
    run.wait_for_line("start 3: 1 rank on 1 node")
    run.wait_for_step(run.last_step() + 3)
    run.supervisor.send_signal(signal.SIGTERM)
    assert run.supervisor.wait(120) == 33, run.printed
    times = [event["time"] for event in real_trainer.records(folder, "events.jsonl")]
    assert times == sorted(times) and began < times[0] and times[-1] < time.time()
    found = goodput(read_run(folder / "run"))
    assert found.num_starts >= 2 and found.waiting_s < found.wall_s < time.time() - began
