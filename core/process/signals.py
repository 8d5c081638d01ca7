"""The signals that mean: stop, save, end."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from core.errors import ExitCode
from core.process.child import Child

# SIGHUP: the terminal is gone. After `nohup` it is ignored, and stays so.
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def heeded() -> list[signal.Signals]:
    """Returns the signals that stop this process: all of them but an ignored SIGHUP."""
    return [s for s in _STOP if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def exit_at_once() -> None:
    """Has a signal end this process from now on, as nothing has been started yet."""
    for number in heeded():
        signal.signal(number, lambda *_: sys.exit(ExitCode.START_AGAIN))


def call_on_stop(stop: Callable[[str], None]) -> None:
    """Has the running event loop call `stop` with the name of each signal that comes."""
    import asyncio  # here, since a command's --help needs none of it

    for number in heeded():
        asyncio.get_running_loop().add_signal_handler(number, stop, number.name)


def hold() -> None:
    """Blocks the signals for good: the exit code is settled, and none may change it any more."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)


@contextmanager
def passed_on(child: Child) -> Iterator[list[signal.Signals]]:
    """Passes each signal that comes meanwhile on to a child, which decides what it means.

    Yields:
        Those that came so far.
    """
    came: list[signal.Signals] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        # A program that heeds the others may not know that a closed terminal means: stop.
        child.send(signal.SIGTERM if number == signal.SIGHUP else came[-1])

    before = {number: signal.signal(number, forward) for number in heeded()}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
