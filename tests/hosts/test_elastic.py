"""Supervisors and machines whose links break, over ranks without torch."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.launch.elastic.conftest import TOY_RANK, wait_until

pytestmark = pytest.mark.hosts


class Run:
    """A supervisor on the first host and an agent on each other one; the toy's files are shared."""

    def __init__(self, folder, environment, supervisor, others, *toy, nodes=None):
        self.folder = folder
        command = ["--", sys.executable, "-E", "-S", str(TOY_RANK), str(folder), *map(str, toy)]
        launch = [sys.executable, "-m", "launch"]
        token = {**environment, "SPOTFORGE_TOKEN": "what all hosts share"}
        supervise = ["supervise", "--nproc", "0", "--listen", "29400"]
        supervise += ["--nodes", str(nodes or len(others))]
        supervise += ["--events", str(folder / "events.jsonl")]
        self._log = folder / "supervisor"
        with self._log.open("w") as output:
            words = [*launch, *supervise, *command]
            self.supervisor = supervisor.start(*words, output=output, env=token)
        self.agents = {}
        for host in others:
            words = [*launch, "join", f"{supervisor.address}:29400", "--nproc", "1", *command]
            with (folder / f"agent-{host.name}").open("w") as output:
                self.agents[host.name] = host.start(*words, output=output, env=token)

    @property
    def printed(self):
        return self._log.read_text()

    def wait_for_line(self, pattern, timeout_s=200):
        return wait_until(lambda: re.search(pattern, self.printed), lambda: self.printed, timeout_s)

    def events(self, name):
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def end(self):
        self.supervisor.send_signal(signal.SIGTERM)
        assert self.supervisor.wait(300) == 33, self.printed


@pytest.fixture
def folder(tmp_path):
    folder = Path(tmp_path) / "run"
    folder.mkdir()
    return folder


LONG = ["--steps", 100000]


def test_two_that_do_not_reach_each_other_are_not_started_together(bed, folder, environment):
    """Both reach the supervisor and the third; when the link heals, all are together again."""
    made = bed("s", "a", "b", "c")
    supervisor, a, b, c = made.hosts
    made.part(a, b)
    run = Run(folder, environment, supervisor, [a, b, c], *LONG)
    left = run.wait_for_line(r"going on without node (\S+), which is tried again in 60 s")[1]
    run.wait_for_line(r"start 1: 2 ranks on 2 nodes")
    assert left in (a.address, b.address)
    (said,) = run.events("apart")
    assert a.address in said["reason"] and b.address in said["reason"]
    made.join(a, b)
    run.wait_for_line(rf"node {re.escape(left)} is reached by all again")
    run.wait_for_line(r"start 2: 3 ranks on 3 nodes")
    run.end()


def test_a_slow_link_is_named_with_its_figure(bed, folder, environment):
    made = bed("s", "a", "b", "c")
    supervisor, a, b, c = made.hosts
    c.slow("20mbit")
    run = Run(folder, environment, supervisor, [a, b, c], *LONG)
    run.wait_for_line(r"start 1: 3 ranks")
    events = run.events("slow")
    assert all(event["mbit_per_s"] < event["others_mbit_per_s"] / 5 for event in events)
    slow = [event["reason"] for event in events]
    assert slow and all(c.address in reason for reason in slow)
    # 20 Mbit/s, shared by two probes in each direction
    speeds = [float(re.search(r": ([\d.]+) Mbit/s, others", reason)[1]) for reason in slow]
    assert all(1 < speed < 40 for speed in speeds)
    run.end()


def test_a_supervisor_that_dies_costs_no_step(bed, folder, environment):
    made = bed("s", "a", "b")
    supervisor, a, b = made.hosts
    run = Run(folder, environment, supervisor, [a, b], *LONG)
    wait_until(lambda: any(folder.glob("gang-*/5-*")), lambda: run.printed)
    run.supervisor.kill()
    for name in "ab":
        log = folder / f"agent-{name}"
        wait_until(lambda log=log: "its ranks save" in log.read_text(), log.read_text)
    wait_until(lambda: (folder / "checkpoint").exists(), lambda: "nothing was saved")
    last = max(int(path.name.partition("-")[0]) for path in folder.glob("gang-*/*-0"))
    assert int((folder / "checkpoint").read_text()) == last
    again = Run(folder, environment, supervisor, [], *LONG, nodes=2)
    again.wait_for_line("start 1: 2 ranks on 2 nodes")
    again.end()


def test_a_machine_that_is_cut_off_is_taken_back_and_later_each_time(bed, folder, environment):
    """A link that comes and goes must not stop the ranks on the other machine each time."""
    made = bed("s", "a", "b")
    supervisor, a, b = made.hosts
    run = Run(folder, environment, supervisor, [a, b], *LONG)
    run.wait_for_line("start 1: 2 ranks on 2 nodes")
    lost = rf"lost node {re.escape(b.address)}"
    for number in (1, 2):
        wait_until(lambda: len(run.events("start")) == 2 * number - 1, lambda: run.printed)  # noqa: B023
        b.cut()
        wait_until(lambda: len(run.events("lost")) == number, lambda: run.printed)  # noqa: B023
        b.heal()
    assert re.search(lost, run.printed)
    run.wait_for_line(
        r"joined \(1 rank\); it was lost 2 times: running ranks do without it for 60 s"
    )
    assert [event["world_size"] for event in run.events("start")] == [2, 1, 2, 1]
    run.end()
