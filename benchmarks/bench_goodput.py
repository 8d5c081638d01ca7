"""Measures goodput on machines that come and go as in a real trace, replayed faster.

    python -m benchmarks.bench_goodput TRACE.json --compression 12 24 --minutes 8

Every node of the trace is an agent (`python -m launch join`) with one rank, under one supervisor,
all on this machine. When the trace loses a node, an agent gets SIGTERM, as after a notice, or
SIGKILL; when it gains one, an agent joins. Measured from the first step on:

    goodput  seconds in steps that count, per second in which the trace had a node
    tokens   tokens that count, per token at this run's median rate for the current number of nodes

Only the trace is compressed: a restart takes its real time, so a replay at 24x pays 24 times as
much for it as the real machines would have.
"""

from __future__ import annotations

import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NoReturn, cast

from benchmarks.availability import Trace
from core.process.python import environment, python
from core.settings.options import OptionParser
from monitoring.environment import describe_environment
from monitoring.goodput import goodput
from monitoring.jsonl import read_records
from monitoring.run_files import read_run

RESULT = Path("benchmarks/results/goodput.json")
TARGET = 0.95
HOURS_BETWEEN_PREEMPTIONS = 6.0  # the trainer's default, which is compressed as well
NOTICE_S = 30.0  # the shortest notice of a cloud (GCP, Azure); it is not compressed
FIRST_STEP_S = 300.0  # includes the preparation of data
Row = dict[str, Any]
OVERRIDES = [
    "experiment=stdlib",
    "parallel=ddp",
    "stop.steps=1000000",
    "stop.minutes=null",
    "schedule=constant",
    "log.every_steps=1",
    "evaluation.every_steps=1000000",
    "export.at_end=false",
    "monitoring.progress=false",
    "monitoring.report=false",
]


@dataclass
class Change:
    """Describes a node that came or went, and the time until the next step was done.

    Attributes:
        at_s: Time of the change since the first step, in seconds.
        kind: Kind of the change: join, notice or kill.
        nodes: Number of nodes afterwards.
        recovery_s: Time until the first step of the new set of ranks, in seconds; None if there is
            no node, or if another change came first.
    """

    at_s: float
    kind: str
    nodes: int
    recovery_s: float | None = None


class Machines:
    """Runs a supervisor, and agents that stand for nodes.

    Args:
        folder: Folder for their files.
        command: Command of one rank.
        num_nodes: Number of nodes to wait for before the first start.
        rng: Generator that chooses which node goes, and how.
        no_notice: Share of the nodes that go without a notice.
    """

    def __init__(
        self, folder: Path, command: list[str], num_nodes: int, rng: random.Random, no_notice: float
    ) -> None:
        self._folder, self._command, self._rng, self._no_notice = folder, command, rng, no_notice
        self._log = (folder / "log").open("a")
        self.supervisor = self._launch(
            *("supervise", "--nproc", "0", "--listen", "127.0.0.1:0"),
            *("--nodes", str(num_nodes), "--events", str(folder / "supervisor.jsonl")),
        )
        self._agents: list[subprocess.Popen[bytes]] = []
        self._going: list[tuple[float, subprocess.Popen[bytes]]] = []
        self._address = self._wait_for_address()

    def join(self) -> str:
        """Adds a node; returns `join`."""
        self._agents.append(self._launch("join", self._address, "--nproc", "1"))
        return "join"

    def leave(self) -> str:
        """Removes a node; returns `notice` or `kill`."""
        agent = self._agents.pop(self._rng.randrange(len(self._agents)))
        if self._rng.random() < self._no_notice:
            # The ranks of the node die with their agent, as on a machine that is gone.
            agent.kill()
            agent.wait()
            return "kill"
        agent.terminate()
        self._going.append((time.monotonic() + NOTICE_S, agent))
        return "notice"

    def check(self) -> None:
        """Kills nodes whose notice has expired, and gives up if the supervisor has ended."""
        for until, agent in list(self._going):
            if agent.poll() is not None:
                self._going.remove((until, agent))
            elif time.monotonic() > until:
                agent.kill()
        if self.supervisor.poll() is not None:
            self.give_up("the supervisor ended")

    def stop(self) -> int:
        """Stops the run as a user would; returns the supervisor's exit code."""
        self.supervisor.terminate()
        return self.supervisor.wait(120)

    def close(self) -> None:
        """Kills all processes; ranks die with their parents."""
        for process in (self.supervisor, *self._agents, *(agent for _, agent in self._going)):
            process.kill()
            process.wait()
        self._log.close()

    def give_up(self, why: str) -> NoReturn:
        """Ends the benchmark with the last output of its processes."""
        raise SystemExit(f"{why}:\n{(self._folder / 'log').read_text()[-3000:]}")

    def _launch(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            python("-m", "launch", *words, "--", *self._command),
            env=environment(OMP_NUM_THREADS="1"),
            stdout=self._log,
            stderr=self._log,
        )

    def _wait_for_address(self) -> str:
        for _ in range(600):
            found = re.search(r"listening on \S*:(\d+)", (self._folder / "log").read_text())
            if found is not None:
                return f"127.0.0.1:{found[1]}"
            self.check()
            time.sleep(0.05)
        self.give_up("the supervisor does not listen")


def replay(
    trace: Trace, compression: float, minutes: float, seed: int, no_notice: float, folder: Path
) -> dict[str, Any]:
    """Replays a window of a trace, and returns how the time was spent.

    Args:
        trace: Trace of nodes.
        compression: Seconds of the trace per second of the replay.
        minutes: Length of the replay, in minutes.
        seed: Seed of the choice which node goes, and how.
        no_notice: Share of the nodes that go without a notice.
        folder: Empty folder for all files.
    """
    hours = minutes / 60 * compression
    first = trace.typical_window(hours)
    plan = [(at_s / compression, nodes) for at_s, nodes in trace.changes(first, hours)]
    run_dir, notes = folder / "run", folder / "notes"
    notes.mkdir(parents=True)
    mean_hours = HOURS_BETWEEN_PREEMPTIONS / compression
    overrides = [f"checkpoint.mean_hours_between_preemptions={mean_hours}", f"run.dir={run_dir}"]
    rank = python("-m", "benchmarks.goodput_rank", str(notes), *OVERRIDES, *overrides)
    machines = Machines(folder, rank, plan[0][1], random.Random(seed), no_notice)
    changes: list[Change] = []
    try:
        for _ in range(plan[0][1]):
            machines.join()
        deadline = time.monotonic() + FIRST_STEP_S
        # The clock starts at the first step, so that preparing data does not count.
        while not any(file.stat().st_size for file in notes.iterdir()):
            machines.check()
            if time.monotonic() > deadline:
                machines.give_up(f"no step in {FIRST_STEP_S:.0f} s")
            time.sleep(0.02)
        began = time.time()
        current = plan[0][1]
        for at_s, nodes in [*plan[1:], (minutes * 60, plan[-1][1])]:
            while (left_s := began + at_s - time.time()) > 0:
                machines.check()
                time.sleep(min(left_s, 0.2))
            while current != nodes:
                now_s = time.time() - began
                kind = machines.join() if nodes > current else machines.leave()
                current += 1 if nodes > current else -1
                changes.append(Change(now_s, kind, current))
        ended = time.time()
        # 33 says that the run has saved and is to be started again.
        if (code := machines.stop()) != 33:
            machines.give_up(f"the supervisor ended with {code} instead of 33")
    finally:
        machines.close()
    found = _measure(run_dir, notes, changes, plan, began, ended)
    wall_s = ended - began
    lost_s = found["available_s"] - found["useful_s"]
    return {
        "trace": trace.name,
        "trace_changes_per_hour": round(trace.changes_per_hour, 3),
        "compression": compression,
        "window": {"first_point": first, "hours": round(hours, 2), "changes": len(changes)},
        "wall_s": round(wall_s, 1),
        **{k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()},
        "lost_s_a_change": round(lost_s / max(1, len(changes)), 2),
        # The goodput without compression: the same lost seconds, in proportionally more time.
        "computed_goodput_uncompressed": round(
            1 - lost_s / (found["available_s"] * compression), 5
        ),
        "changes": [asdict(change) for change in changes],
    }


def _measure(
    run_dir: Path,
    notes: Path,
    changes: list[Change],
    plan: list[tuple[float, int]],
    began: float,
    ended: float,
) -> dict[str, Any]:
    rows = cast(list[Row], [row for file in notes.iterdir() for row in read_records(file)])
    rows.sort(key=lambda row: row["time"])
    records = cast(list[Row], read_records(run_dir / "metrics.jsonl"))
    done = [row for row in rows if "done" in row]
    last_done = {row["step"]: row for row in done}  # a repeated step counts when done last
    rates: dict[int, list[float]] = {}
    useful_s = tokens = 0.0
    for record in records:
        row = last_done[record["step"]]
        if began < row["time"] <= ended:
            rates.setdefault(row["ranks"], []).append(record["tokens_per_s"])
            useful_s += record["step_s"]
            tokens += record["tokens_per_s"] * record["step_s"]
    rate = {n: statistics.median(values) for n, values in sorted(rates.items())}
    spans = [
        (end_s - start_s, nodes)
        for (start_s, nodes), (end_s, _) in pairwise([*plan, (ended - began, 0)])
    ]
    available_s = sum(s for s, nodes in spans if nodes > 0)
    # A number of nodes at which no step was done has no rate, and no tokens are counted as lost.
    ideal_tokens = sum(s * rate.get(nodes, 0.0) for s, nodes in spans)
    for change, later in zip_longest(changes, changes[1:]):
        from_s, until_s = change.at_s, later.at_s if later is not None else ended - began
        recovered = (
            row["time"] - began - from_s
            for row in done
            if from_s < row["time"] - began <= until_s and row["ranks"] == change.nodes
        )
        change.recovery_s = next(recovered, None)
    repeated, skipped = _count_samples(rows, len(records))
    account = goodput(read_run(run_dir))
    assert account is not None
    return {
        "available_s": available_s,
        "useful_s": useful_s,
        "goodput": useful_s / available_s,
        "tokens": tokens / ideal_tokens,
        "median_tokens_per_s": {str(n): round(value) for n, value in rate.items()},
        "starts": account.num_starts,
        "losses_without_notice": account.num_losses,
        "steps": len(records),
        "steps_lost": account.lost_steps,
        "samples_repeated": repeated,
        "samples_skipped": skipped,
        "recovery_s": {
            kind: _spread([c.recovery_s for c in changes if c.kind == kind])
            for kind in ("join", "notice", "kill")
        },
        "account_s": {k: round(v, 1) for k, v in asdict(account).items() if k.endswith("_s")},
    }


def _count_samples(rows: list[Row], num_steps: int) -> tuple[int, int]:
    """Returns how many samples the steps that count trained on twice, and skipped."""
    kept: dict[int, list[Row]] = {}  # by step, the rows of the ranks that did it last
    for row in rows:
        if "samples" in row and row["step"] <= num_steps:
            ranks = kept.setdefault(row["step"], [])
            # Another gang is a later start, which did the step again.
            if ranks and ranks[0]["gang"] != row["gang"]:
                ranks.clear()
            ranks.append(row)
    seen = [i for ranks in kept.values() for row in ranks for i in row["samples"]]
    return len(seen) - len(set(seen)), len(set(range(max(seen) + 1)) - set(seen))


def _spread(values: Sequence[float | None]) -> dict[str, float | int]:
    known = [v for v in values if v is not None]
    if not known:
        return {"count": 0}
    return {
        "count": len(known),
        "median": round(statistics.median(known), 2),
        "worst": round(max(known), 2),
    }


def main() -> int:
    """Runs the command line; returns 1 if a sample was repeated or skipped."""
    parser = OptionParser(prog="python -m benchmarks.bench_goodput")
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE.json")
    parser.add_argument("--compression", nargs="+", type=float, default=[12.0], metavar="X")
    parser.add_argument("--minutes", type=float, default=8.0, help="of each replay (default: 8)")
    parser.add_argument("--max-nodes", type=int, default=2, help="to use at once (default: 2)")
    parser.add_argument("--no-notice", type=float, default=0.25, help="share (default: 0.25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs the cleanup of all processes
    results = []
    for path in options.traces:
        trace = Trace.read(path, options.max_nodes)
        for compression in options.compression:
            with tempfile.TemporaryDirectory(prefix="spotforge-goodput-") as folder:
                found = replay(
                    trace,
                    compression,
                    options.minutes,
                    options.seed,
                    options.no_notice,
                    Path(folder),
                )
            results.append(found)
            print(
                f"{found['trace']} at {compression:g}x: goodput {found['goodput']:.1%}, tokens "
                f"{found['tokens']:.1%}; {found['window']['changes']} changes, {found['starts']} "
                f"starts, {found['steps']} steps, {found['steps_lost']} lost, samples: "
                f"{found['samples_repeated']} repeated, {found['samples_skipped']} skipped",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "config": {
            "overrides": OVERRIDES,
            "target": TARGET,
            "minutes": options.minutes,
            "max_nodes": options.max_nodes,
            "no_notice": options.no_notice,
            "notice_s": NOTICE_S,
            "seed": options.seed,
        },
        "environment": describe_environment(),
        "replays": results,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(r["samples_repeated"] or r["samples_skipped"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
