"""The real trainer on hosts that share no disk, under a supervisor on a host without ranks."""

import json
import re
import signal
import sys

from tests.chaos.setup import BASE, STRATEGIES, write_corpus
from tests.launch.elastic.conftest import wait_until
from tests.words import last_of_each

PORT = 29400


class Cluster:
    """A supervisor, and machines that join it; each has `run.dir` and prepared data on its disk.

    Args:
        bed: The bed, whose first host is the supervisor's.
        folder: Folder for what programs print.
        environment: Environment of all programs.
        nodes: Number of machines that the first start waits for.
        strategy: Name among `STRATEGIES`.
        overrides: Settings of the run.
    """

    def __init__(self, bed, folder, environment, nodes, strategy, *overrides):
        self.bed, self._folder, self._nodes = bed, folder, nodes
        self._environment = {**environment, "SPOTFORGE_TOKEN": "what all hosts share"}
        self._overrides = overrides
        if not (folder / "corpus").exists():
            write_corpus(folder / "corpus")
        self._command = ["--", sys.executable, "-m", "trainer", *self.words(*STRATEGIES[strategy])]
        self.agents = {}
        self.supervise()

    def words(self, *more):
        """The settings of the run, with others in their places."""
        disk = self.bed.hosts[0].disk
        words = [f"data.path={self._folder}/corpus", f"data.cache_dir={disk}/cache"]
        words += [f"run.dir={disk}/run", *self._overrides]
        return last_of_each([*BASE, *words, *more])

    def supervise(self):
        """Starts a supervisor; agents that have lost theirs find it."""
        words = ["supervise", "--nproc", "0", "--listen", str(PORT), "--nodes", str(self._nodes)]
        words += ["--events", str(self._folder / "supervisor.jsonl")]
        self.supervisor = self._launch(self.bed.hosts[0], "supervisor", *words)

    def join(self, host):
        """Starts an agent with one rank on a host."""
        words = ["join", f"{self.bed.hosts[0].address}:{PORT}", "--nproc", "1"]
        self.agents[host.name] = self._launch(host, f"agent-{host.name}", *words)

    @property
    def printed(self):
        """What all have printed."""
        logs = [self._folder / "supervisor", *sorted(self._folder.glob("agent-*"))]
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')}" for log in logs)

    def wait_for_line(self, pattern, since=0, timeout_s=200):
        """Waits until something prints a line, and returns the match."""
        found = wait_until(
            lambda: re.search(pattern, self.printed[since:]), lambda: self.printed, timeout_s
        )
        return found

    def wait_for(self, condition, timeout_s=200):
        """Waits until a condition holds; fails at once if the run has ended instead."""

        def held():
            return condition() or self.supervisor.poll() is not None

        wait_until(held, lambda: self.printed, timeout_s)
        assert condition(), self.printed

    def wait_for_steps(self, hosts, num):
        """Waits until so many steps more were logged on any of some hosts."""
        before = max(map(last_step, hosts))
        self.wait_for(lambda: max(map(last_step, hosts)) >= before + num)

    def stop(self):
        """Stops the run as a user would; returns the exit code."""
        self.supervisor.send_signal(signal.SIGTERM)
        return self.supervisor.wait(200)

    def _launch(self, host, log, *words):
        with (self._folder / log).open("a") as output:
            launched = [sys.executable, "-m", "launch", *words, *self._command]
            return host.start(*launched, output=output, env=self._environment)


def records(host, name="metrics.jsonl"):
    """What a file of the run holds on a host, as far as its last line is whole."""
    path = host.path(f"run/{name}")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(host):
    """The newest step that was logged on a host; 0 without one."""
    return max((record["step"] for record in records(host)), default=0)


def num_saved(host):
    """The number of checkpoints on a host's disk."""
    return len(list(host.path("run/checkpoints").glob("step-*")))
