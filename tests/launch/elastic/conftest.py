"""Starts real supervisors and agents over toy ranks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOY_RANK = Path(__file__).with_name("toy_rank.py")
LONG = ["--steps", 100000]  # which no machine ever comes to the end of


def wait_until(condition, what, timeout_s=300):
    """What `condition` returns, once that is true; fails with what `what()` says.

    It has to stay true, or a late look would miss it.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)
    return value


class Running:
    """A `python -m launch` that runs, and what it printed."""

    def __init__(self, arguments, log, env):
        self._log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "launch", *map(str, arguments)],
                cwd=ROOT,
                env=env,
                stderr=stderr,
            )

    @property
    def printed(self):
        return self._log.read_text()

    def wait_for_line(self, pattern, timeout_s=300):
        """The match of `pattern` in what it prints, now or later."""
        return wait_until(
            lambda: re.search(pattern, self.printed),
            lambda: f"no {pattern!r} in:\n{self.printed}",
            timeout_s,
        )

    def send(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def end(self, timeout_s=300):
        """Its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end:\n{self.printed}") from None


class Site:
    """A run: its folder, its command, and the processes that take part."""

    def __init__(self, folder):
        self.folder = folder
        self._running = []

    def command(self, *toy):
        return ["--", sys.executable, "-E", "-S", TOY_RANK, self.folder, *toy]

    def launch(self, *arguments, env=None):
        log = self.folder / f"stderr-{len(self._running)}"
        # What a killed one leaves in its temporary folder goes with the test.
        running = Running(arguments, log, {**os.environ, "TMPDIR": str(self.folder), **(env or {})})
        self._running.append(running)
        return running

    def supervise(self, *options, toy=(), env=None):
        events = ["--events", self.folder / "events.jsonl"]
        return self.launch("supervise", *events, *options, *self.command(*toy), env=env)

    def listen(self, *options, toy=(), host="127.0.0.1", env=None):
        """A supervisor that listens on a port of this machine, and that port."""
        supervisor = self.supervise("--listen", f"{host}:0", *options, toy=toy, env=env)
        return supervisor, int(supervisor.wait_for_line(r"listening on .*:(\d+)")[1])

    def join(self, port, *options, toy=(), env=None):
        return self.launch("join", f"127.0.0.1:{port}", *options, *self.command(*toy), env=env)

    def starts(self):
        """What each rank that started wrote, in order."""
        path = self.folder / "starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self):
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def checkpoint(self):
        return int((self.folder / "checkpoint").read_text())

    def wait_for_step(self, step, timeout_s=300):
        """Waits until a rank is done with `step`."""
        wait_until(
            lambda: any(self.folder.glob(f"gang-*/{step}-*")),
            lambda: f"no step {step}:\n" + "\n".join(r.printed for r in self._running),
            timeout_s,
        )

    def close(self):
        for running in self._running:
            running.process.kill()  # its ranks die with it
            running.process.wait()


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    site.close()


def is_running(pid):
    """Whether a process is there, and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
