"""Progress of a long pass over blocks: a bar on a terminal, or ten lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int, int], None]  # blocks that are done, and all of them


@contextmanager
def bar(task: str, unit: str = "block") -> Iterator[Advance]:
    """Shows how many blocks (or other units) of a task are done, and the time that is left.

    Args:
        task: Text before the bar.
        unit: Word for what is counted.

    Yields:
        Function to call with the number that is done and the total.
    """
    columns = (TextColumn(task), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as shown:
        row = shown.add_task(task)
        began, first, told = time.monotonic(), -1, -1

        def advance(done: int, total: int) -> None:
            nonlocal began, first, told
            shown.update(row, total=total, completed=done)
            # The first call may come from a resumed task: what was done before must not count as
            # fast.
            if first < 0:
                began, first = time.monotonic(), done
                if done and shown.disable:
                    print(f"{task}: going on after {unit} {done} of {total}", file=sys.stderr)
            elif shown.disable and (done * 10 // total > told or done == total):
                told = done * 10 // total
                left_s = (time.monotonic() - began) / (done - first) * (total - done)
                print(f"{task}: {unit} {done} of {total}, {left_s:.0f} s left", file=sys.stderr)

        yield advance
