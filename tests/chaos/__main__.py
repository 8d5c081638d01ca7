"""Hurts training runs in every way that the plan knows of, and checks what becomes of them.

    python -m tests.chaos                                  100 kills, 50 stops, 20 rounds
    python -m tests.chaos --only kills --kills 10 --seed 7

kills   SIGKILL of a random rank at a random moment, half of them while saving; after every fifth
        the newest checkpoint is damaged; full disks, and second jobs on one run directory
stops   SIGTERM, SIGUSR1, a notice file or a cloud's notice on one random rank
rounds  a machine is lost and comes back, under the real supervisor

The seed decides what is done, to whom, and at which moment it is aimed; when exactly it lands is up
to the scheduler of the operating system. Exit code 1 if any promise was broken.
"""

import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from core.settings.options import OptionParser
from monitoring.environment import describe_environment
from tests.chaos import checkpoints, faults, injections
from tests.chaos.long_run import LongRun
from tests.chaos.page import summarize, write_page
from tests.chaos.rounds import ROOT, rounds
from tests.chaos.setup import INTERVAL, Layout, write_corpus

RESULT = Path("benchmarks/results/chaos.json")
_DAMAGE_EVERY = 5  # kills
_MIXED = [Layout(strategy, ranks) for strategy in ("ddp", "fsdp") for ranks in (2, 3)]
# name: layouts, share of the injections, copies to an object store
_KILLED = {
    "ddp": ([Layout("ddp", 2)], 0.3, False),
    "fsdp": ([Layout("fsdp", 2)], 0.3, False),
    "mixed": (_MIXED, 0.2, False),
    "uploading": ([Layout("fsdp", 2)], 0.1, True),
    "zero": ([Layout("zero2", 2)], 0.1, False),
}
_STOPPED = {
    "stopped ddp": ([Layout("ddp", 2)], 0.4, False),
    "stopped mixed": ([*_MIXED, Layout("zero3", 2)], 0.6, False),
}


class Suite:
    """All injections, into runs in `folder`.

    Args:
        folder: For runs; an empty one.
        seed: Decides everything that is chosen.
        tell: Takes each row as it comes.
    """

    def __init__(self, folder, seed, tell):
        self._folder, self._seed, self._tell = folder, seed, tell
        self._corpus = write_corpus(folder / "corpus")
        self._num_damaged = 0

    def kills(self, count):
        """Kills, damage, full disks and second jobs."""
        for name, (layouts, share, uploads) in _KILLED.items():
            run = self._run(name, layouts, uploads)
            for number, place in enumerate(self._places(run, round(count * share), uploads), 1):
                self._tell(injections.kill(run, place))
                if number % _DAMAGE_EVERY == 0:
                    kind = list(checkpoints.DAMAGE)[self._num_damaged % len(checkpoints.DAMAGE)]
                    self._num_damaged += 1
                    self._tell(injections.damage(run, kind))
            if len(layouts) == 1 and not uploads:
                self._tell(faults.start_twice(run))
                self._tell(faults.fill_disk(run, layouts[0]))
            self._tell(run.finish())

    def stops(self, count):
        """Stops of every source in every phase, in turn."""
        sources, places = list(injections.REASONS), list(injections.STOPPED_IN)
        # As many phases as sources and one more: so each meets each.
        pairs = [(places[i % len(places)], sources[i % len(sources)]) for i in range(count)]
        self._rng("stops").shuffle(pairs)
        for name, (layouts, share, uploads) in _STOPPED.items():
            run = self._run(name, layouts, uploads)
            mine, pairs = pairs[: round(count * share)], pairs[round(count * share) :]
            for place, source in mine:
                self._tell(injections.stop(run, place, source))
            self._tell(run.finish())

    def rounds(self, count):
        """Loses a machine and gets it back."""
        rounds(self._run("elastic", [Layout("ddp", 1), Layout("ddp", 2)], False), count, self._tell)

    def _run(self, name, layouts, uploads):
        folder = self._folder / name.replace(" ", "-")
        folder.mkdir()
        return LongRun(name, folder, self._corpus, layouts, self._rng(name), uploads)

    def _rng(self, name):
        return random.Random(f"{self._seed}:{name}")

    def _places(self, run, count, uploads):
        """Half of them in a save, and each place as often as the others."""
        saving, elsewhere = list(injections.SAVING), list(injections.ELSEWHERE)
        if uploads:
            saving = ["upload"]
        run.rng.shuffle(saving)
        run.rng.shuffle(elsewhere)
        half = count // 2
        places = [saving[i % len(saving)] for i in range(count - half)]
        places += [elsewhere[i % len(elsewhere)] for i in range(half)]
        run.rng.shuffle(places)
        return places


def main():
    """Entry point; returns the exit code."""
    parser = OptionParser(prog="python -m tests.chaos")
    parser.add_argument("--seed", type=int, default=0)
    counts = {"kills": 100, "stops": 50, "rounds": 20}
    for kind, count in counts.items():
        parser.add_argument(f"--{kind}", type=int, default=count, metavar="N")
    parser.add_argument("--only", choices=counts)
    parser.add_argument("--out", type=Path, default=RESULT, help="and a page beside it")
    options = parser.parse_args()
    counts = {k: getattr(options, k) for k in counts if options.only in (None, k)}

    rows, began = [], time.monotonic()

    def tell(row):
        rows.append(row)
        verdict = f"BROKEN: {row.problems[0][:300]}" if row.problems else "held"
        where = row.layout if row.rank is None else f"{row.layout}, rank {row.rank}"
        print(
            f"{time.monotonic() - began:6.0f} s  {row.run}: {row.source}, {row.moment} "
            f"({where}, step {row.step}): {verdict}",
            flush=True,
        )

    with tempfile.TemporaryDirectory(prefix="spotforge-chaos-") as folder:
        suite = Suite(Path(folder), options.seed, tell)
        for kind, count in counts.items():
            getattr(suite, kind)(count)
    result = {
        "config": {"seed": options.seed, **counts, "checkpoint.interval": INTERVAL},
        "environment": describe_environment(),
        "duration_s": round(time.monotonic() - began, 1),
        "summary": summarize(rows),
        "injections": [_plain(asdict(row), folder) for row in rows],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    page = write_page(result, options.out.with_suffix(".html"))
    broken = [row for row in rows if row.problems]
    for row in broken:  # some came to light at the next start only
        print(f"BROKEN  {row.run}: {row.source}, {row.moment}: {row.problems[0][:300]}")
    print(f"{len(broken)} of {len(rows)} broke a promise: {page}")
    return 1 if broken else 0


def _plain(row, folder):
    """A row without the paths of this machine."""
    problems = [p.replace(f"{ROOT}/", "").replace(folder, "RUNS") for p in row["problems"]]
    return row | {"seconds": round(row["seconds"], 2), "problems": problems}


if __name__ == "__main__":
    sys.exit(main())
