"""Sends signs of life of this rank to the supervisor that started it.

`python -m launch supervise` gives every rank a folder, SPOTFORGE_RANK_DIR. A rank that no longer
touches `heartbeat` in it hangs, and is asked for its stack by SIGUSR2 before it is killed. Without
a supervisor nothing is written.
"""

import faulthandler
import os
import signal
import time
import traceback
from pathlib import Path

from core import layout
from parallel.launcher import RANK_DIR_VARIABLE

PROCESS_BEGAN = time.monotonic()  # before torch and transformers are imported, which takes seconds


class Heartbeat:
    """Writes `<phase> <step>` into a file, whose modification time is that of the beat.

    Attributes:
        step: Number of the current step.
    """

    def __init__(self) -> None:
        folder = os.environ.get(RANK_DIR_VARIABLE)
        self._folder = Path(folder) if folder else None
        self._fd: int | None = None
        self._text = b"starting 0"
        self.step = 0
        if self._folder is not None:
            self._fd = os.open(self._folder / layout.HEARTBEAT, os.O_WRONLY | os.O_CREAT, 0o600)
            # The file stays open, since faulthandler's C code cannot open one in a signal handler.
            self._stacks = (self._folder / layout.STACK).open("w")
            faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        self.beat()

    def at(self, phase: str, step: int) -> None:
        """Beats and reports the current phase and step: `train 12`, `evaluate 12`, ..."""
        self.step = step
        self._text = f"{phase} {step}".encode()
        self.beat()

    def beat(self) -> None:
        """Beats without a change of phase."""
        if self._fd is not None:
            # One write of fixed size, so that a reader never sees a partial line.
            os.pwrite(self._fd, self._text.ljust(63) + b"\n", 0)

    def failed(self) -> None:
        """Writes the traceback of the exception being handled."""
        if self._folder is not None:
            (self._folder / layout.ERROR).write_text(traceback.format_exc())
