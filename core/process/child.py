"""Programs that this process starts: they die with it, and its terminal is not theirs.

On Linux such a program is killed when the thread that started it ends, so it has to be started by a
thread that lives as long as it does. Elsewhere only one that reads its standard input hears of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from core.errors import ConfigError

if TYPE_CHECKING:
    import asyncio

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_KILL_S = 5.0
_POLL_S = 0.5


def popen(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Starts a program.

    Args:
        command: The program and its words.
        options: Those of `subprocess.Popen` that differ from `_options`.
    """
    return subprocess.Popen(command, **_options(options))


async def spawn(command: Sequence[str], **options: Any) -> asyncio.subprocess.Process:
    """Starts a program for the event loop that runs; see `popen`."""
    import asyncio  # here, since a command's --help needs none of it

    return await asyncio.create_subprocess_exec(*command, **_options(options))


def _options(given: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,  # a program that waits for a key waits for ever
        "preexec_fn": _die_with_parent(),
    }
    if "process_group" not in given:
        # Ctrl-C reaches this process only, which decides what it means; and the program and all
        # that it starts can be killed together.
        defaults["start_new_session"] = True
    return defaults | given


def _die_with_parent() -> Callable[[], None] | None:
    """Returns what a child calls before it becomes its program."""
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


def check_program(command: Sequence[str]) -> None:
    """Raises ConfigError where there is no such program."""
    if shutil.which(command[0]) is None:
        raise ConfigError("COMMAND", command[0], "no such program", "check its path")


def describe_exit(code: int) -> str:
    """Returns `died of SIGKILL` or `failed with exit code 1`.

    Args:
        code: As Popen has it: -N for a program that died of signal N.
    """
    if code >= 0:
        return f"{'failed' if code else 'ended'} with exit code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"died of signal {-code}"


def exit_code(code: int) -> int:
    """Returns what a shell would say: 128 + N for a program that died of signal N."""
    return code if code >= 0 else 128 - code


def kill_group(pid: int) -> None:
    """Sends SIGKILL to a program that leads its process group, and to what it has started."""
    # Nobody may be left in it, which macOS calls a lack of permission.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class Child:
    """A program that runs until it ends, or until this is left; a context manager.

    Args:
        command: The program and its words.
        env: Its environment; None: this process's.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._process = popen(command, env=env)

    @property
    def pid(self) -> int:
        """Its process id, which is that of its group too."""
        return self._process.pid

    def wait(self, seconds: float | None = None) -> int | None:
        """Waits for its end, for at most `seconds`.

        Returns:
            The code, -N where it died of signal N; None while it runs.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the program, if it still runs; SIGKILL also to what it has started."""
        if self._process.poll() is not None:
            return
        if number == signal.SIGKILL:
            kill_group(self.pid)
        else:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kills the program, if it still runs, and in any case what it has left behind."""
        kill_group(self.pid)

    def close(self) -> None:
        """Kills all of it, and waits a moment for its end."""
        self.kill()
        self.wait(_KILL_S)  # what is stuck in the kernel stays; nothing more can be done to it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Finished:
    """A program that has ended.

    Attributes:
        code: -N where it died of signal N.
        out: What it wrote to standard output.
        err: What it wrote to standard error.
    """

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line of standard error that is not empty, which mostly tells what failed."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def run(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    poll: Callable[[], None] | None = None,
) -> Finished:
    """Runs a program to its end, and keeps what it says.

    Args:
        command: The program and its words.
        env: Its environment; None: this process's.
        timeout_s: It is killed after so many seconds; None: never.
        poll: Called twice a second; the program is killed where it raises.

    Raises:
        OSError: It cannot be started.
        TimeoutError: It was killed after `timeout_s`.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = popen(command, env=env, encoding="utf-8", errors="replace", **pipes)
    began_s = time.monotonic()
    try:
        while True:
            left_s = None if timeout_s is None else began_s + timeout_s - time.monotonic()
            wait_s = left_s if poll is None else _POLL_S if left_s is None else min(_POLL_S, left_s)
            try:
                out, err = process.communicate(timeout=wait_s)
                return Finished(process.returncode, out, err)
            except subprocess.TimeoutExpired:
                if timeout_s is not None and time.monotonic() >= began_s + timeout_s:
                    raise TimeoutError(f"{command[0]} was killed after {timeout_s:g} s") from None
            if poll is not None:
                poll()
    finally:
        if process.returncode is None:
            kill_group(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_S)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
