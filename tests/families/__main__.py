"""The table of families: what every column makes of every family, beside stock transformers.

    python -m tests.families                   all that was not measured since the product changed,
                                               then docs/models.md
    python -m tests.families gemma2 serve int8 these families and columns, again; no page

It works in `build/families`, and exits with 1 where a cell is wrong.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.families.cells import Cell, Cells
from tests.families.page import write_page
from tests.families.places import COLUMNS, COMPRESSION, SERVING, TRAINING, Places
from tests.families.workers import Outcome, Workers

PROJECT = Path(__file__).parents[2]
_TIMEOUT_S = 300.0  # of a cell: 20 times what it takes


def main(words: list[str]) -> int:
    """Measures, and writes the page; returns the exit code."""
    root = PROJECT / "build" / "families"
    root.mkdir(parents=True, exist_ok=True)
    first = Workers("first", root)
    features = first.call("training.features", timeout_s=_TIMEOUT_S).said
    families = [name for name in features if name in words] or list(features)
    if unknown := sorted(set(words) - {*features, *COLUMNS}):
        print(f"{unknown[0]}: is no family and no column", file=sys.stderr)
        return 2
    columns = [name for name in COLUMNS if name in words] or list(COLUMNS)
    first.call("training.prepare_folder", root, families, timeout_s=_TIMEOUT_S)
    first.close()
    cells = Cells(root / "cells.json", PROJECT)
    wanted = [
        (family, column)
        for family in families
        for column in columns
        if words or cells.get(family, column) is None
    ]
    progress = _Progress(cells, len(wanted))
    with ThreadPoolExecutor(2) as pool:  # of one or two processes each
        lanes = [
            pool.submit(_train, root, _of(wanted, TRAINING), progress),
            pool.submit(_judge_each, "compressing", root, _of(wanted, COMPRESSION), progress),
            pool.submit(_judge_each, "served", root, _of(wanted, SERVING), progress),
        ]
        for lane in lanes:
            lane.result()
    found = {f: {c: cells.get(f, c) for c in columns} for f in families}
    wrong = [
        f"{family} {column}: {cell.said}"
        for family, row in found.items()
        for column, cell in row.items()
        if cell is not None and cell.state == "wrong"
    ]
    print(f"{len(wrong)} wrong", *wrong, sep="\n  ")
    if not words:
        write_page(PROJECT / "docs" / "models.md", found, features)
    return 1 if wrong else 0


class _Progress:
    """Keeps cells, and says how far it is.

    Args:
        cells: Where they are kept.
        total: How many there will be.
    """

    def __init__(self, cells: Cells, total: int) -> None:
        self._cells, self._total, self._done = cells, total, 0
        self._began_s, self._lock = time.monotonic(), threading.Lock()

    def measure(self, places: Places, column: str, work: Callable[[], Outcome]) -> Cell:
        """Does the work of a cell."""
        began_s = time.monotonic()
        outcome = work()
        said = outcome.said if isinstance(outcome.said, str) else ""
        for path, name in ((places.model, "MODEL"), (places.root, "FOLDER")):
            said = said.replace(str(path), name)
        cell = Cell(outcome.state, " ".join(said.split()), round(time.monotonic() - began_s, 1))
        self._cells.put(places.family, column, cell)
        with self._lock:
            self._done += 1
            minutes = (time.monotonic() - self._began_s) / 60
            left = minutes / self._done * (self._total - self._done)
            print(
                f"[{self._done}/{self._total}, {minutes:.0f} min, about {left:.0f} more] "
                f"{places.family} {column}: {cell.state} ({cell.seconds} s) {cell.said}",
                flush=True,
            )
        return cell


def _train(root: Path, wanted: dict[str, list[str]], progress: _Progress) -> None:
    judge, ranks = Workers("judge", root), Workers("ranks", root, num_ranks=2)

    def trained(places: Places, column: str) -> Outcome:
        outcome = ranks.call("training.train", places, column, timeout_s=_TIMEOUT_S)
        if outcome.state != "ok":
            return outcome
        verdict = judge.call("training.judge_weights", places, column, timeout_s=_TIMEOUT_S)
        return outcome if verdict.state == "ok" else verdict

    def exported(places: Places) -> Outcome:
        if not (places.run("ddp") / "export").exists():
            outcome = ranks.call("training.train", places, "ddp", timeout_s=_TIMEOUT_S)
            if outcome.state != "ok":
                return outcome
        return judge.call("training.judge_export", places, timeout_s=_TIMEOUT_S)

    for family, columns in wanted.items():
        places = Places(root, family)
        for column in columns:
            if column == "loss":
                work = partial(judge.call, "training.judge_loss", places, timeout_s=_TIMEOUT_S)
            elif column == "export":
                work = partial(exported, places)
            else:
                work = partial(trained, places, column)
            progress.measure(places, column, work)
    judge.close()
    ranks.close()


def _judge_each(module: str, root: Path, wanted: dict[str, list[str]], progress: _Progress) -> None:
    """Measures columns whose module judges by itself."""
    worker = Workers(module, root)
    for family, columns in wanted.items():
        for column in columns:
            places = Places(root, family)
            work = partial(worker.call, f"{module}.judge", places, column, timeout_s=_TIMEOUT_S)
            progress.measure(places, column, work)
    worker.close()


def _of(wanted: Iterable[tuple[str, str]], columns: Iterable[str]) -> dict[str, list[str]]:
    """Columns of each family, those of one lane."""
    chosen: dict[str, list[str]] = {}
    for family, column in wanted:
        if column in columns:
            chosen.setdefault(family, []).append(column)
    return chosen


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
