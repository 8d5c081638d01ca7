"""Turns a signal into a flag that all ranks agree on."""

import signal
import threading
from types import FrameType, TracebackType


class StopSignal:
    """Catches SIGTERM, SIGUSR1 and SIGINT while it is entered.

    A handler only sets a flag: the loop sends it along with a collective that each step makes
    anyway, so that no rank stops alone. A signal may come several times (a terminal and a launcher
    both pass it on), so a second one changes nothing.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self._event = threading.Event()
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in self._SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self) -> bool:
        """Whether this process was told to stop."""
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Waits for the flag for at most `seconds`."""
        return self._event.wait(seconds)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._event.set()
