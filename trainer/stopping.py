"""Turns a signal or a notice of preemption into a flag that all ranks agree on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

from core import layout
from core.folder import write_file
from parallel.launcher import RANK_DIR_VARIABLE
from trainer.preemption import NoticeSource

_WAIT_POLL_S = 0.02
_JOIN_S = 1.0
_PATIENCE_S = 180.0  # Azure's service may take two minutes to start


class StopSignal:
    """Catches SIGTERM, SIGUSR1 and SIGINT while it is entered, and watches for notices.

    It only sets a flag. The loop sends the flag along with a collective of each step, so no rank
    stops alone. A signal may come several times (a terminal and a launcher both forward it), so a
    second one changes nothing.

    Under a supervisor, which sets SPOTFORGE_RANK_DIR, a rank that was told to stop writes the
    reason to `stop_reason.txt` in that folder.
    """

    _SIGNALS: dict[int, str] = {
        signal.SIGTERM: "SIGTERM",
        signal.SIGUSR1: "SIGUSR1",
        signal.SIGINT: "SIGINT",
    }

    def __init__(self) -> None:
        # A list that only grows, not a threading.Event: a signal handler runs between any two
        # instructions of the main thread, and would deadlock on a lock that this thread holds.
        self._reasons: list[str] = []
        self._previous: dict[int, object] = {}
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()  # ends the watcher; handlers never use it
        self._recording = threading.Lock()  # handlers never use it
        self._recorded = False

    def __enter__(self) -> StopSignal:
        for number in self._SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join(_JOIN_S)  # a request in progress ends by its own timeout
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.requested()  # records a signal that came since the last call

    @property
    def reason(self) -> str | None:
        """Reason to stop that this process was given first; None if there is none."""
        return self._reasons[0] if self._reasons else None

    def requested(self) -> bool:
        """Returns whether this process was told to stop; may write a file, so not for handlers."""
        if not self._reasons:
            return False
        self._record(self._reasons[0])
        return True

    def wait(self, seconds: float) -> bool:
        """Waits up to `seconds` for the flag; returns whether it is set."""
        deadline = time.monotonic() + seconds
        while not self.requested():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(left_s, _WAIT_POLL_S))
        return True

    def give_up(self, reason: str) -> None:
        """Tells the supervisor that this machine cannot go on, as after a notice."""
        self._reasons.append(reason)
        self.requested()

    def watch(self, sources: Sequence[NoticeSource], poll_s: float) -> None:
        """Polls `sources` in the background until one of them announces something.

        A source that fails is polled again. After three minutes of failures a message is printed,
        since notices are missed until it answers.
        """
        assert self._watcher is None, "already watching"
        if sources:
            watched = [_Watched(source) for source in sources]
            self._watcher = threading.Thread(
                target=self._poll, args=(watched, poll_s), name="preemption", daemon=True
            )
            self._watcher.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Appending to a list takes no lock, which makes it safe in a signal handler.
        self._reasons.append(self._SIGNALS[number])

    def _poll(self, watched: list[_Watched], poll_s: float) -> None:
        while not self.requested():
            for source in watched:
                notice = source.poll()
                if self._closed.is_set():
                    return
                if notice is not None:
                    self._reasons.append(notice)
                    break
            else:
                if self._closed.wait(poll_s):
                    return

    def _record(self, reason: str) -> None:
        with self._recording:
            folder = os.environ.get(RANK_DIR_VARIABLE)
            if folder is None or self._recorded:
                return
            self._recorded = True
            path = Path(folder) / layout.STOP_REASON
            try:
                write_file(path, f"{reason}\n")
            except OSError as e:
                print(f"{path} could not be written ({e}); stopping: {reason}", file=sys.stderr)


class _Watched:
    """Polls a source of notices, and keeps track of how long it has been failing."""

    def __init__(self, source: NoticeSource) -> None:
        self._source = source
        self._failing_since: float | None = None
        self._said = False

    def poll(self) -> str | None:
        try:
            notice = self._source.poll()
        except Exception as e:  # whatever fails here, training does not depend on it
            self._failed(e)
            return None
        self._failing_since, self._said = None, False
        return notice

    def _failed(self, error: Exception) -> None:
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        failing_s = now - self._failing_since
        if failing_s >= _PATIENCE_S and not self._said:
            self._said = True
            print(
                f"{self._source.what}: no usable answer for {failing_s:.0f} s ({error}); still "
                "asking, but until it answers notices are missed",
                file=sys.stderr,
                flush=True,
            )
