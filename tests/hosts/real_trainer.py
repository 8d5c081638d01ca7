"""The real trainer on hosts that share its folder.

python -m tests.hosts.real_trainer --deaths 20 --seed 0     kills the supervisor so many times
"""

import itertools
import json
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from core.settings.options import OptionParser
from tests.chaos.setup import BASE, write_corpus
from tests.hosts.bed import Bed
from tests.hosts.conftest import environment_of_hosts
from tests.launch.elastic.conftest import wait_until
from tests.words import last_of_each

# From a start to the first steps on a busy machine: what is aimed at has to come in this time.
_MOMENTS_S = 15.0


def command(folder, *overrides):
    """A run of many short steps in `folder`, which all hosts share."""
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    # Prepared data is shared, too.
    words = [f"data.path={folder}/corpus", f"data.cache_dir={folder}/cache"]
    words = last_of_each([*BASE, *words, f"run.dir={folder}/run", *overrides])
    return [sys.executable, "-m", "trainer", *words]


def place(rank, hosts):
    """Variables of the only rank on a host, as torchrun sets them."""
    variables = {"RANK": rank, "WORLD_SIZE": len(hosts), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    variables |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": 29500}
    return {name: str(value) for name, value in variables.items()}


def records(folder, name="metrics.jsonl"):
    """What a file of the run has, as far as its last line is whole."""
    path = folder / "run" / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(folder):
    """The newest step that was logged; 0 without one."""
    return max((record["step"] for record in records(folder)), default=0)


class Run:
    """A supervisor without ranks on one host, and an agent with one rank on each other one."""

    def __init__(self, folder, environment, host, others, *overrides):
        self.folder, self._host, self._others = folder, host, others
        self._environment = {**environment, "SPOTFORGE_TOKEN": "what all hosts share"}
        self._command = ["--", *command(folder, *overrides)]
        self.supervise()
        self.agents = {}
        for other in others:
            self.join(other)

    def join(self, host, more=None):
        """Starts an agent on a host, with more variables."""
        words = ["join", f"{self._host.address}:29400", "--nproc", "1"]
        self.agents[host.name] = self._launch(host, f"agent-{host.name}", *words, more=more)

    def supervise(self):
        """Starts a supervisor; agents that have lost theirs find it."""
        words = ["supervise", "--nproc", "0", "--listen", "29400"]
        words += ["--nodes", str(len(self._others))]
        words += ["--events", str(self.folder / "run" / "supervisor.jsonl")]
        self.supervisor = self._launch(self._host, "supervisor", *words)

    def said(self, name):
        """What the agent on a host printed, and its ranks."""
        return (self.folder / f"agent-{name}").read_text(errors="replace")

    @property
    def printed(self):
        """What all have printed."""
        logs = [self.folder / "supervisor", *sorted(self.folder.glob("agent-*"))]
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')}" for log in logs)

    def last_step(self):
        return last_step(self.folder)

    def wait_for_start(self, number):
        """Waits until so many supervisors have started ranks on all hosts."""
        line = f"start 1: {len(self._others)} ranks"
        log = self.folder / "supervisor"
        wait_until(lambda: log.read_text().count(line) >= number, lambda: self.printed)

    def wait_for_line(self, pattern):
        wait_until(lambda: re.search(pattern, self.printed), lambda: self.printed)

    def wait_for_step(self, step):
        wait_until(lambda: self.last_step() >= step, lambda: self.printed)

    def _launch(self, host, log, *words, more=None):
        with (self.folder / log).open("a") as output:
            launched = [sys.executable, "-m", "launch", *words, *self._command]
            env = {**self._environment, **(more or {})}
            return host.start(*launched, output=output, env=env)


def kill_supervisors(folder, environment, hosts, deaths, seed, tell):
    """Kills the supervisor again and again, at a random moment of each start, and starts another.

    Returns:
        The promises that were broken, in words.
    """
    rng = random.Random(seed)
    host, *others = hosts
    run = Run(folder, environment, host, others)
    for number in range(1, deaths + 1):
        run.wait_for_start(number)
        time.sleep(rng.uniform(0, _MOMENTS_S))
        if run.supervisor.poll() is not None:
            return [f"supervisor {number} ended by itself:\n{run.printed}"]
        run.supervisor.kill()
        run.supervisor.wait()
        tell(f"death {number} at step {last_step(folder)}")
        run.supervise()
    run.wait_for_start(deaths + 1)
    run.wait_for_step(last_step(folder) + 3)
    run.supervisor.send_signal(signal.SIGTERM)
    ends = [run.supervisor.wait(120), *(agent.wait(120) for agent in run.agents.values())]
    problems = [] if set(ends) == {33} else [f"exit codes {ends} instead of 33"]
    return problems + _judge(folder)


def _judge(folder):
    """What is wrong in the files of a run that was stopped often, and lost nothing."""
    events = [e for e in records(folder, "events.jsonl") if e["event"] in ("start", "stop", "fail")]
    problems = []
    for before, after in itertools.pairwise(events):
        if before["event"] == "start" and after["event"] != "stop":
            problems.append(f"the start after step {before['step']} did not save: {after}")
        if before["event"] == "stop" and (after["event"], after["step"]) != (
            "start",
            before["step"],
        ):
            problems.append(f"after the stop at step {before['step']} came {after}")
    steps = [record["step"] for record in records(folder)]
    if steps != list(range(1, len(steps) + 1)) or steps[-1:] != [events[-1]["step"]]:
        problems.append(f"metrics.jsonl has the steps {steps}")
    return problems


def main():
    """Entry point; returns the exit code."""
    parser = OptionParser(prog="python -m tests.hosts.real_trainer", description=__doc__)
    parser.add_argument("--deaths", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spotforge-deaths-") as folder:
        bed = Bed(Path(folder), "s", "a", "b")
        shared = Path(folder) / "shared"
        shared.mkdir()
        try:
            problems = kill_supervisors(
                shared, environment_of_hosts(), bed.hosts, options.deaths, options.seed, print
            )
        finally:
            bed.close()
    print(*(problems or ["every promise held"]), sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
