"""The signals that mean: stop, save, end; and the one that ends what has lost its parent."""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable

from core.errors import ExitCode

# SIGHUP: the terminal is gone. After `nohup` it is ignored, and stays so.
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def heeded() -> list[signal.Signals]:
    """Those of them that are not ignored."""
    return [s for s in _STOP if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def exit_at_once() -> None:
    """Until `call_on_stop`, a signal ends this process: nothing has been started yet."""
    for number in heeded():
        signal.signal(number, lambda *_: sys.exit(ExitCode.START_AGAIN))


def call_on_stop(stop: Callable[[str], None]) -> None:
    """Has the running event loop call `stop` with the name of each signal that comes."""
    for number in heeded():
        asyncio.get_running_loop().add_signal_handler(number, stop, number.name)


def hold() -> None:
    """Blocks them for good: the exit code is settled, and none may change it any more."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)


def describe_exit(code: int) -> str:
    """`died of SIGKILL` or `failed with exit code 1`."""
    if code >= 0:
        return f"failed with exit code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"died of signal {-code}"


def die_with_parent() -> Callable[[], None] | None:
    """What a child calls before it becomes its program, so that it does not outlive its starter."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def before_exec() -> None:
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return before_exec
