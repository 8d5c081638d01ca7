"""Hurts a run on machines without a shared disk in every way, and checks what becomes of it.

    python -m tests.hosts.chaos                                60 faults, about 35 minutes
    python -m tests.hosts.chaos --faults 10 --strategy zero2 --seed 7

kill        all processes of a machine and its disk are gone; an empty one joins in its place
cut         a machine reaches nobody for a while
part        two machines do not reach each other for a while
one way     one machine does not reach another one, which still reaches it
slow        a machine sends and receives 20 Mbit/s for a while
full        the disk of a machine is full; it is cleared, and the machine joins again
supervisor  the supervisor is killed; another one is started at its address

The seed decides what is done and to whom. After each fault the run has to go on: with all machines
again, and with a checkpoint that all of them have committed. Exit code 1 if a promise was broken.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from core.settings.options import OptionParser
from monitoring.environment import describe_environment
from tests.chaos import checkpoints
from tests.chaos.setup import STRATEGIES
from tests.hosts.bed import Bed, missing
from tests.hosts.cluster import Cluster, last_step, records
from tests.hosts.conftest import environment_of_hosts

RESULT = Path("benchmarks/results/chaos_hosts.json")
MACHINES = 3
EVERY = 10  # steps between saves
PROMISED_S = 60.0  # from a fault to the next new step
_HURT_S = (10.0, 25.0)  # how long a link is bad
_RESUMED_EVERY = 5  # faults after which the checkpoint is resumed elsewhere, in another layout
_KINDS = {"kill": 4, "cut": 3, "part": 2, "one way": 2, "slow": 2, "full": 3, "supervisor": 3}
_WAIT_S = 300.0


@dataclass
class Row:
    """One fault, and what came of it.

    Attributes:
        kind: Kind of the fault.
        whom: Names of the machines that it hit.
        step: Last step that was logged before it.
        resumed: Step after which the run went on; None if nothing had to start again.
        lost_steps: Steps that were done again.
        seconds: From the fault to the first new step.
        whole_s: From the fault, or the end of a bad link, to a checkpoint of all machines.
        problems: Promises that it broke.
    """

    kind: str
    whom: str
    step: int = 0
    resumed: int | None = None
    lost_steps: int = 0
    seconds: float = 0.0
    whole_s: float = 0.0
    problems: list[str] = field(default_factory=list)


class Chaos:
    """A run on `MACHINES` machines, and the faults that it gets.

    Args:
        bed: Empty bed.
        folder: Folder for what programs print, and for copies of checkpoints.
        strategy: Name among `STRATEGIES`.
        seed: Decides everything that is chosen.
        tell: Function that takes each row.
    """

    def __init__(self, bed, folder, strategy, seed, tell):
        self.bed, self.folder, self.strategy = bed, folder, strategy
        self.rng, self.tell = random.Random(seed), tell
        self.overrides = [f"checkpoint.interval={EVERY}", "stop.steps=1000000"]
        self.logged: dict[int, float] = {}  # loss of each step, as it was first logged
        self._names = (f"m{i}" for i in range(1, 1000))
        environment = environment_of_hosts()
        bed.add("s")
        self.cluster = Cluster(bed, folder, environment, MACHINES, strategy, *self.overrides)
        self.machines = [self._add() for _ in range(MACHINES)]

    def run(self, count):
        """Waits for the first checkpoint, does so many faults, and ends the run."""
        row = Row("start", "all")
        if not self._wait(lambda: self._is_whole(0)):
            row.problems.append(self._tail("no checkpoint of all machines"))
            self.tell(row)
            return
        kinds = [kind for kind, weight in _KINDS.items() for _ in range(weight)]
        for number in range(1, count + 1):
            if number % len(kinds) == 1:
                self.rng.shuffle(kinds)
            row = self._hurt(kinds[number % len(kinds)])
            if not row.problems:
                row.problems += self._judge(resumes=number % _RESUMED_EVERY == 0)
            self.tell(row)
            if row.problems:
                return
        self.tell(self._end())

    # -- faults ------------------------------------------------------------------------------------

    def _hurt(self, kind):
        one, other = self.rng.sample(self.machines, 2)
        row = Row(kind, one.name)
        time.sleep(self.rng.uniform(0, 3))  # at any moment between two saves
        self._note()
        row.step, since = self._last_step(), self._num_starts()
        began = time.monotonic()
        hurt_s = self.rng.uniform(*_HURT_S)
        if kind == "kill":
            one.kill()
            self.machines.remove(one)
            self._await_step(row, began)
            self.machines.append(self._add())
        elif kind == "cut":
            one.cut()
            self._heal(row, began, hurt_s, one.heal)
        elif kind == "part":
            row.whom = f"{one.name}, {other.name}"
            self.bed.part(one, other)
            self._heal(row, began, hurt_s, lambda: self.bed.join(one, other))
        elif kind == "one way":
            row.whom = f"{one.name} -> {other.name}"
            one.lose(other)
            self._heal(row, began, hurt_s, lambda: one.find(other))
        elif kind == "slow":
            one.slow("20mbit")
            self._heal(row, began, hurt_s, one.fast)
        elif kind == "full":
            one.fill()
            agent = self.cluster.agents[one.name]
            self._wait(lambda: agent.poll() is not None)
            self._await_step(row, began)
            one.clear()
            self.cluster.join(one)
        else:
            row.whom = "s"
            self.cluster.supervisor.kill()
            self.cluster.supervisor.wait()
            self.cluster.supervise()
            # Ranks do some steps more, save and stop; what counts is when others go on.
            self._wait(lambda: self._num_starts() > since)
            self._await_step(row, began, self._last_step())
        whole = time.monotonic()
        if not row.problems and not self._wait(lambda: self._is_whole(row.step)):
            row.problems.append(self._tail("not all machines are together again"))
        row.whole_s = time.monotonic() - whole
        starts = self._starts()[since:]
        if starts:
            row.resumed = starts[0]["step"]
            row.lost_steps = max(0, row.step - row.resumed)
            if row.lost_steps > 2 * EVERY:
                row.problems.append(f"{row.lost_steps} steps were lost, though {EVERY} are saved")
        return row

    def _heal(self, row, began, hurt_s, heal):
        """Ends a fault after a while; a run that cannot go on before may do so after it."""
        time.sleep(hurt_s)
        heal()
        self._await_step(row, began + hurt_s)

    def _await_step(self, row, began, step=0):
        """Waits for a step after the last one before the fault, or after a later one."""
        if not self._wait(lambda: self._last_step() > max(row.step, step)):
            row.problems.append(self._tail("no new step"))
        row.seconds = max(0.0, time.monotonic() - began)
        if row.seconds > PROMISED_S:
            row.problems.append(f"{row.seconds:.0f} s to the next step")

    def _add(self):
        host = self.bed.add(next(self._names))
        self.cluster.join(host)
        return host

    # -- what is there -----------------------------------------------------------------------------

    def _last_step(self):
        return max((last_step(host) for host in self.machines), default=0)

    def _first(self):
        """The machine of rank 0: the one that has logged last."""

        def last_time(host):
            events = records(host, "events.jsonl")
            return events[-1]["time"] if events else 0.0

        return max(self.machines, key=last_time)

    def _events(self):
        return records(self._first(), "events.jsonl")

    def _starts(self):
        return [event for event in self._events() if event["event"] == "start"]

    def _num_starts(self):
        return len(self._starts())

    def _is_whole(self, step):
        """Whether all machines train together, and have committed a checkpoint after a step."""
        starts = self._starts()
        if not starts or starts[-1]["world_size"] != MACHINES:
            return False
        saved = [e["step"] for e in self._events() if e["event"] == "checkpoint"]
        return bool(saved) and saved[-1] > max(step, starts[-1]["step"])

    def _note(self):
        """Keeps the losses that were logged; a step that is done again must have the same."""
        for host in self.machines:
            for record in records(host):
                self.logged.setdefault(record["step"], record["loss"])

    def _wait(self, condition):
        deadline = time.monotonic() + _WAIT_S
        while not condition():
            if time.monotonic() > deadline or self.cluster.supervisor.poll() is not None:
                return condition()
            time.sleep(0.1)
        return True

    def _tail(self, what):
        return f"{what}:\n{self.cluster.printed[-6000:]}"

    # -- promises ----------------------------------------------------------------------------------

    def _judge(self, resumes):
        """What is wrong with the newest checkpoint and the metrics."""
        problems = []
        steps = [record["step"] for record in records(self._first())]
        if steps != list(range(1, len(steps) + 1)):
            problems.append("metrics.jsonl lacks or repeats a step")
        path = self._gathered()
        if path is None:
            return [*problems, "no checkpoint could be copied"]
        if (fault := checkpoints.fault(path)) is not None:
            problems.append(f"{path.name} is committed, but {fault}")
        elif resumes:
            problems += self._resumed_alone(path)
        shutil.rmtree(path)
        return problems

    def _gathered(self):
        """A copy of the newest checkpoint from the disks of all machines; None without one."""
        out = self.folder / "gathered"
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(20):  # one may be removed while it is copied
            saved = [e["step"] for e in self._events() if e["event"] == "checkpoint"]
            name = f"step-{saved[-1]:08d}"
            try:
                for host in self.machines:
                    source = host.path(f"run/checkpoints/{name}")
                    shutil.copytree(source, out / name, dirs_exist_ok=True)
                return out / name
            except (OSError, shutil.Error):
                shutil.rmtree(out, ignore_errors=True)
                time.sleep(0.2)
        return None

    def _resumed_alone(self, checkpoint):
        """Goes on for two steps on one rank under DDP, and compares losses with the run's own."""
        step = int(checkpoint.name.removeprefix("step-"))
        if not self._wait(lambda: self._last_step() >= step + 2):
            return [self._tail("no steps to compare with")]
        self._note()
        run_dir = self.folder / "alone"
        shutil.rmtree(run_dir, ignore_errors=True)
        places = [f"run.dir={run_dir}", f"data.cache_dir={self.folder}/cache"]
        goal = [f"resume={checkpoint}", f"stop.steps={step + 2}"]
        words = self.cluster.words(*STRATEGIES["ddp"], *places, *goal)
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *words],
            env=environment_of_hosts(),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            return [f"{checkpoint.name} is not read by one rank: {done.stderr[-2000:]}"]
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        found = {r["step"]: r["loss"] for r in map(json.loads, lines) if r["step"] > step}
        return [
            f"step {s}: loss {loss} on one rank, {self.logged[s]} in the run"
            for s, loss in found.items()
            if abs(loss - self.logged[s]) > 1e-6 * abs(self.logged[s])
        ]

    def _end(self):
        row = Row("end", "all", self._last_step())
        began = time.monotonic()
        code = self.cluster.stop()
        row.seconds = time.monotonic() - began
        if code != 33:
            row.problems.append(self._tail(f"exit code {code} instead of 33"))
        return row


def summarize(rows):
    """One line for each kind of fault: how many, lost steps, seconds to the next step."""
    kinds = defaultdict(list)
    for row in rows:
        kinds[row.kind].append(row)
    lines = [f"{'fault':<12}{'count':>6}{'lost steps':>12}{'median s':>10}{'worst s':>9}{'bad':>5}"]
    for kind, found in kinds.items():
        seconds = [row.seconds for row in found]
        lost = max(row.lost_steps for row in found)
        bad = sum(bool(row.problems) for row in found)
        lines.append(
            f"{kind:<12}{len(found):>6}{lost:>12}{statistics.median(seconds):>10.1f}"
            f"{max(seconds):>9.1f}{bad:>5}"
        )
    return "\n".join(lines)


def main():
    """Entry point; returns the exit code."""
    parser = OptionParser(prog="python -m tests.hosts.chaos")
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="fsdp")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if why := missing():
        print(why, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no host is left behind
    rows = []
    environment = describe_environment()
    began = time.monotonic()

    def tell(row):
        rows.append(row)
        minutes = (time.monotonic() - began) / 60
        print(
            f"{minutes:5.1f} min  {len(rows):>3}  {row.kind:<11}{row.whom:<10} step {row.step:>5}, "
            f"next after {row.seconds:5.1f} s, all together after {row.whole_s:5.1f} s",
            *row.problems,
            sep="\n      ",
            flush=True,
        )
        result = {
            "environment": environment,
            "cores": os.cpu_count(),
            "seed": arguments.seed,
            "strategy": arguments.strategy,
            "machines": MACHINES,
            "save_every_steps": EVERY,
            "seconds": 60 * minutes,
            "rows": [asdict(row) for row in rows],
        }
        # After each fault, so that a run that is stopped has its results, too.
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        bed = Bed(Path(folder), disk_mb=64)
        try:
            chaos = Chaos(bed, Path(folder), arguments.strategy, arguments.seed, tell)
            chaos.run(arguments.faults)
        finally:
            bed.close()
    print(summarize(rows))
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
