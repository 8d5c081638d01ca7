"""Signs of life of this rank, for the supervisor that started it.

`python -m launch supervise` gives every rank a folder, SPOTFORGE_RANK_DIR. A rank that no longer
touches `heartbeat` in it hangs, and is asked by SIGUSR2 for its stack before it is killed. Without
a supervisor all of this does nothing.
"""

import faulthandler
import os
import signal
import time
import traceback
from pathlib import Path

PROCESS_BEGAN = time.monotonic()  # before torch and transformers are imported: seconds each


class Heartbeat:
    """Writes `<phase> <step>`; the time of the file is that of the beat.

    Attributes:
        step: Where this rank is.
    """

    def __init__(self) -> None:
        folder = os.environ.get("SPOTFORGE_RANK_DIR")
        self._folder = Path(folder) if folder else None
        self._fd: int | None = None
        self._text = b"starting 0"
        self.step = 0
        if self._folder is not None:
            self._fd = os.open(self._folder / "heartbeat", os.O_WRONLY | os.O_CREAT, 0o600)
            # The file stays open: a handler at the level of C cannot open one.
            self._stacks = (self._folder / "stack.txt").open("w")
            faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        self.beat()

    def at(self, phase: str, step: int) -> None:
        """Beats, and says where this rank is: `train 12`, `evaluate 12`, ..."""
        self.step = step
        self._text = f"{phase} {step}".encode()
        self.beat()

    def beat(self) -> None:
        """Still there."""
        if self._fd is not None:
            # One write of fixed size: a reader never sees half of it.
            os.pwrite(self._fd, self._text.ljust(63) + b"\n", 0)

    def failed(self) -> None:
        """Leaves the traceback of the exception being handled."""
        if self._folder is not None:
            (self._folder / "error.txt").write_text(traceback.format_exc())
