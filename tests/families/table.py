"""Measures cells: which processes do what, and how far they are."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.families.cells import Cell, Cells
from tests.families.places import COMPRESSION, SERVING, TRAINING, Places
from tests.families.workers import Outcome, Workers

_TIMEOUT_S = 300.0  # of a cell: 20 times what it takes


def measure(root: Path, wanted: Sequence[tuple[str, str]], cells: Cells) -> None:
    """Measures cells, two at a time, and keeps them.

    Args:
        root: For models, runs and logs.
        wanted: Family and column of each; the column `export` comes after `fsdp`.
        cells: Where they are kept.
    """
    progress = _Progress(cells, len(wanted))
    with ThreadPoolExecutor(2) as pool:  # of one or two processes each
        lanes = [
            pool.submit(_train, root, _of(wanted, TRAINING), progress),
            pool.submit(_judge_each, "compressing", root, _of(wanted, COMPRESSION), progress),
            pool.submit(_judge_each, "served", root, _of(wanted, SERVING), progress),
        ]
        for lane in lanes:
            lane.result()


def prepare(root: Path, families: list[str]) -> dict[str, str]:
    """Writes the models of some families, or of all where the list is empty.

    Returns:
        What is special about each family that there is.
    """
    root.mkdir(parents=True, exist_ok=True)
    worker = Workers("prepare", root)
    outcome = worker.call("training.prepare_folder", root, families, timeout_s=_TIMEOUT_S)
    worker.close()
    if outcome.state != "ok":
        raise RuntimeError(f"the models could not be made: {outcome.said}")
    features: dict[str, str] = outcome.said
    return features


class _Progress:
    """Keeps cells, and says how far it is.

    Args:
        cells: Where they are kept.
        total: How many there will be.
    """

    def __init__(self, cells: Cells, total: int) -> None:
        self._cells, self._total, self._done = cells, total, 0
        self._began_s, self._lock = time.monotonic(), threading.Lock()

    def measure(self, places: Places, column: str, work: Callable[[], Outcome]) -> None:
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


def _train(root: Path, wanted: dict[str, list[str]], progress: _Progress) -> None:
    judge, ranks = Workers("judge", root), Workers("ranks", root, num_ranks=2)

    def trained(places: Places, column: str) -> Outcome:
        outcome = ranks.call("training.train", places, column, timeout_s=_TIMEOUT_S)
        if outcome.state != "ok":
            return outcome
        verdict = judge.call("training.judge_weights", places, column, timeout_s=_TIMEOUT_S)
        return outcome if verdict.state == "ok" else verdict

    def exported(places: Places) -> Outcome:
        if not (places.run("fsdp") / "export").exists():
            outcome = ranks.call("training.train", places, "fsdp", timeout_s=_TIMEOUT_S)
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
            judge = f"{module}.judge"
            work = partial(worker.call, judge, places, column, timeout_s=_TIMEOUT_S)
            progress.measure(places, column, work)
    worker.close()


def _of(wanted: Iterable[tuple[str, str]], columns: Iterable[str]) -> dict[str, list[str]]:
    """Columns of each family, those of one lane."""
    chosen: dict[str, list[str]] = {}
    for family, column in wanted:
        if column in columns:
            chosen.setdefault(family, []).append(column)
    return chosen
