"""Child programs that die with this process and do not share its terminal.

On Linux the kernel kills a child when the thread that started it ends, so a child must be started
by a thread that lives as long as it does. On other systems a child learns that its parent is gone
only if it reads its standard input.
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

_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
_KILL_S = 5.0
_POLL_S = 0.5


def popen(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Starts a program.

    Args:
        command: Program and its arguments.
        options: Options of `subprocess.Popen` that differ from the defaults in `_options`.
    """
    return subprocess.Popen(command, **_options(options))


async def spawn(command: Sequence[str], **options: Any) -> asyncio.subprocess.Process:
    """Starts a program for the running event loop; see `popen`."""
    import asyncio  # imported here because --help does not need it

    return await asyncio.create_subprocess_exec(*command, **_options(options))


def _options(given: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,  # a program that asks for a key would wait for ever
        "preexec_fn": _die_with_parent(),
    }
    if "process_group" not in given:
        # In a session of its own the child gets no Ctrl-C: this process decides what that
        # means. The child and all that it starts can also be killed together.
        defaults["start_new_session"] = True
    return defaults | given


def _die_with_parent() -> Callable[[], None] | None:
    """Returns the function that a child calls between fork and exec, or None off Linux."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def before_exec() -> None:
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
        # The parent may have died before prctl took effect, and then no signal would come.
        if os.getppid() != parent:
            os._exit(1)

    return before_exec


def check_program(command: Sequence[str]) -> None:
    """Raises ConfigError if the program does not exist."""
    if shutil.which(command[0]) is None:
        raise ConfigError("COMMAND", command[0], "no such program", "check its path")


def describe_exit(code: int) -> str:
    """Returns how a program ended, as `died of SIGKILL` or `failed with exit code 1`.

    Args:
        code: Return code as Popen gives it: -N for a program that died of signal N.
    """
    if code >= 0:
        return f"{'failed' if code else 'ended'} with exit code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"died of signal {-code}"


def exit_code(code: int) -> int:
    """Returns the exit code as a shell reports it: 128 + N for a program that died of signal N."""
    return code if code >= 0 else 128 - code


def kill_group(pid: int) -> None:
    """Sends SIGKILL to a program that leads its process group, and to all that it started."""
    # macOS reports an empty process group as a lack of permission.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class Child:
    """Runs a program until it ends or until this context manager is left.

    Args:
        command: Program and its arguments.
        env: Environment of the program; None passes on this process's.

    Raises:
        OSError: The program cannot be started.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._process = popen(command, env=env)

    @property
    def pid(self) -> int:
        """Process id of the program, which is also the id of its process group."""
        return self._process.pid

    def wait(self, seconds: float | None = None) -> int | None:
        """Waits until the program ends, for at most `seconds`.

        Returns:
            Return code, -N if it died of signal N; None while the program runs.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to a running program; SIGKILL also reaches all that it started."""
        if self._process.poll() is not None:
            return
        if number == signal.SIGKILL:
            kill_group(self.pid)
        else:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kills the program if it still runs, and in any case what it left behind."""
        kill_group(self.pid)

    def close(self) -> None:
        """Kills the program and all that it started, and waits up to 5 s for its end."""
        self.kill()
        # A process in an uninterruptible system call may outlast the wait; nothing ends it sooner.
        self.wait(_KILL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Finished:
    """Holds the result of a program that has ended.

    Attributes:
        code: Return code, -N if it died of signal N.
        out: Text that the program wrote to standard output.
        err: Text that the program wrote to standard error.
    """

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """Last non-empty line of standard error, which usually names the failure."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else "it printed no error"


def run(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    poll: Callable[[], None] | None = None,
) -> Finished:
    """Runs a program to its end and returns its output.

    Args:
        command: Program and its arguments.
        env: Environment of the program; None passes on this process's.
        timeout_s: Time after which the program is killed, in seconds; None sets no limit.
        poll: Function called twice a second; the program is killed if it raises.

    Raises:
        OSError: The program cannot be started.
        TimeoutError: The program was killed after `timeout_s`.
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
        # Only an error or a timeout leaves the program running here.
        if process.returncode is None:
            kill_group(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_S)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
