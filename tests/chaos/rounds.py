"""Machines that come and go under the real supervisor: 2 ranks -> 1 -> 2, round after round."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.chaos import checkpoints
from tests.chaos.long_run import read_records
from tests.chaos.setup import INTERVAL, Row

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0  # longer is a deadlock
PROMISED_S = 15.0  # from the loss of a machine to the next step
_COMPARED = 300  # steps; later ones differ by more than rounding once may
_POLL_S = 0.02


class Elastic:
    """A supervisor with one rank of its own, and a second machine that joins it.

    Args:
        run: A `LongRun` that says what to train; nothing of it is started here.
    """

    def __init__(self, run):
        self.run = run
        run.folder.mkdir(parents=True, exist_ok=True)
        self._log = run.folder / "supervisor.log"
        overrides = run.overrides("stop.steps=1000000")
        self._command = ["--", sys.executable, "-m", "trainer", *overrides]
        events = ["--events", run.folder / "supervisor.jsonl"]
        self.supervisor = self._launch("supervise", "--listen", "127.0.0.1:0", *events)
        self._machine = None

    def join(self):
        """Starts the second machine."""
        port = self._wait_for(lambda: re.search(r"listening on .*:(\d+)", self.printed()))[1]
        self._machine = self._launch("join", f"127.0.0.1:{port}")

    def lose(self):
        """The second machine is gone from one moment to the next."""
        self._machine.kill()
        self._machine.wait()

    def wait_for_step(self, world_size, since):
        """Waits for a new step on so many ranks.

        Args:
            world_size: Of the gang.
            since: (events, file) as `mark()` gave them before.

        Returns:
            The step that this start went on from; None if no new step came.
        """
        num_events, inode = since

        def stepped():
            events = [e for e in self.run.events()[num_events:] if e["event"] == "start"]
            if not events or events[-1]["world_size"] != world_size or self._inode() == inode:
                return None
            start = events[-1]["step"]
            return (start,) if self.run.last_step() > start else None

        found = self._wait_for(stepped)
        return found[0] if found is not None else None

    def mark(self):
        """What was there before something is done: each start replaces the file of metrics."""
        return len(self.run.events()), self._inode()

    def printed(self):
        """What the supervisor and all that it started have said."""
        return self._log.read_text(errors="replace")

    def stop(self):
        """Stops it as a user would.

        Returns:
            The exit code; None if it did not end.
        """
        self.supervisor.send_signal(signal.SIGTERM)
        try:
            return self.supervisor.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            return None

    def close(self):
        """Leaves nothing running: ranks die with who started them."""
        for process in (self.supervisor, self._machine):
            if process is not None:
                process.kill()
                process.wait()

    def _launch(self, verb, *options):
        arguments = [verb, *map(str, options), "--nproc", "1", *self._command]
        with self._log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "launch", *arguments],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def _inode(self):
        path = self.run.run_dir / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def _wait_for(self, condition):
        deadline = time.monotonic() + WAIT_S
        while not (found := condition()):
            if time.monotonic() > deadline or self.supervisor.poll() is not None:
                return None
            time.sleep(_POLL_S)
        return found


def rounds(run, count, tell, promised_s=PROMISED_S):
    """Loses and regains a machine `count` times.

    Args:
        run: Names the folder and the configuration.
        count: Of rounds.
        tell: Takes each row as it comes.
        promised_s: From the loss of a machine to the next step.
    """
    elastic = Elastic(run)
    try:
        before = elastic.mark()
        elastic.join()
        if elastic.wait_for_step(2, before) is None:
            row = Row("round", "start", "join", run.name, "ddp x 2")
            row.problems.append(f"two machines do not train: {elastic.printed()[-2000:]}")
            tell(row)
            return
        for _ in range(count):
            row = _lose(elastic, promised_s)
            tell(row)
            if not row.problems:
                row = _rejoin(elastic)
                tell(row)
            if row.problems:
                return
        tell(_end(elastic))
    finally:
        elastic.close()


def _lose(elastic, promised_s):
    run = elastic.run
    row = Row("round", "2 -> 1", "SIGKILL of a machine", run.name, "ddp x 1", rank=1)
    time.sleep(run.rng.uniform(0, 1.0))  # anywhere between two saves
    before, began = elastic.mark(), time.monotonic()
    elastic.lose()
    row.step = run.last_step()
    row.resumed = elastic.wait_for_step(1, before)
    _judge(elastic, row, time.monotonic() - began)
    if row.resumed is not None:
        row.checkpoint, row.lost_steps = row.resumed, max(0, row.step - row.resumed)
        if row.lost_steps > 2 * INTERVAL:
            row.problems.append(f"lost {row.lost_steps} steps, though it saves every {INTERVAL}")
    if row.seconds > promised_s:
        row.problems.append(f"{row.seconds:.1f} s to the next step instead of {promised_s:.0f}")
    return row


def _rejoin(elastic):
    run = elastic.run
    row = Row("round", "1 -> 2", "a machine joins", run.name, "ddp x 2")
    before, began = elastic.mark(), time.monotonic()
    elastic.join()
    row.resumed = elastic.wait_for_step(2, before)
    _judge(elastic, row, time.monotonic() - began)
    if row.resumed is not None:
        stops = [e["step"] for e in run.events()[before[0] :] if e["event"] == "stop"]
        row.step = row.checkpoint = row.resumed
        if stops[-1:] != [row.resumed]:
            row.problems.append(f"stopped after {stops}, resumed after step {row.resumed}")
    return row


def _judge(elastic, row, seconds):
    row.seconds = seconds
    if row.resumed is None:
        row.problems.append(f"no step within {WAIT_S:.0f} s: {elastic.printed()[-2000:]}")


def _end(elastic):
    run = elastic.run
    row = Row("end", "finish", "SIGTERM of the supervisor", run.name, "ddp x 2")
    began = time.monotonic()
    code = elastic.stop()
    row.seconds = time.monotonic() - began
    if code != 33:
        row.problems.append(f"exit code {code} instead of 33: {elastic.printed()[-2000:]}")
    row.step, row.checkpoint = run.last_step(), run.newest()
    if row.step != row.checkpoint:
        row.problems.append(f"step {row.step} was completed, step {row.checkpoint} is saved")
    for path in checkpoints.steps(run.checkpoints).values():
        if (fault := checkpoints.fault(path)) is not None:
            row.problems.append(f"{path.name} is committed, but {fault}")
    records = read_records(run.run_dir / "metrics.jsonl")
    steps = [record["step"] for record in records]
    if any(after != step + 1 for step, after in itertools.pairwise([0, *steps])):
        row.problems.append("metrics.jsonl lacks or repeats a step")
    row.problems += run.compare(records[:_COMPARED])
    return row
