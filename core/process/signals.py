"""Handling of the signals that ask a process to stop, save and end."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from core.errors import ExitCode
from core.process.child import Child

# SIGHUP means that the terminal is gone. Under `nohup` it is ignored, and stays ignored.
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def heeded() -> list[signal.Signals]:
    """Returns the signals that stop this process: all stop signals but an ignored SIGHUP."""
    return [s for s in _STOP if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def exit_at_once() -> None:
    """Makes stop signals end this process at once, while nothing has been started yet."""
    for number in heeded():
        signal.signal(number, lambda *_: sys.exit(ExitCode.START_AGAIN))


def call_on_stop(stop: Callable[[str], None]) -> None:
    """Makes the running event loop call `stop` with the name of each stop signal."""
    import asyncio  # imported here because --help does not need it

    for number in heeded():
        asyncio.get_running_loop().add_signal_handler(number, stop, number.name)


def hold() -> None:
    """Blocks the stop signals for good, so that none changes an exit code that is settled."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)


@contextmanager
def passed_on(start: Callable[[], Child]) -> Iterator[tuple[Child, list[signal.Signals]]]:
    """Starts a child and forwards each stop signal to it, which decides what it means.

    A signal that comes while the child is being started is forwarded once it runs.

    Yields:
        The child, which is killed at the end, and the list of the signals that have come so far.
    """
    children: list[Child] = []
    came: list[signal.Signals] = []

    def send(number: signal.Signals) -> None:
        for child in children:
            # A program that handles the other signals may not know that SIGHUP asks it to stop too.
            child.send(signal.SIGTERM if number == signal.SIGHUP else number)

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        send(came[-1])

    before = {number: signal.signal(number, forward) for number in heeded()}
    try:
        with start() as child:
            children.append(child)
            for number in list(came):
                send(number)
            yield child, came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
