"""One program that this process runs: it hears the signals that come, and does not outlive it."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType
from typing import Self

from core.errors import ConfigError
from launch.elastic.signals import die_with_parent, exit_at_once, heeded

_KILL_S = 5.0


def check_program(command: Sequence[str]) -> None:
    """Raises ConfigError where there is no such program."""
    if shutil.which(command[0]) is None:
        raise ConfigError("COMMAND", command[0], "no such program", "check its path")


class Child:
    """Starts a program, and passes on to it every signal that means: stop. A context manager.

    Leaving it kills what is left of the program's process group.

    Args:
        command: The program and its words; see `check_program`.

    Attributes:
        told: Whether a signal came.
    """

    def __init__(self, command: Sequence[str]) -> None:
        exit_at_once()  # until there is something to pass signals on to
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process only, which passes it on
            preexec_fn=die_with_parent(),
        )
        self.told = False
        for number in heeded():
            signal.signal(number, self._forward)

    def wait(self, seconds: float | None = None) -> int | None:
        """Waits for the end, for at most `seconds`.

        Returns:
            The exit code, 128 + N for one that died of signal N; None while it runs.
        """
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Sends SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL to the program and what it has started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nobody is left in it; macOS calls that a lack of permission

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        try:
            self._process.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            pass  # stuck in the kernel; nothing more can be done to it

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        # A program that heeds the others may not know that a closed terminal means: stop.
        self._process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
