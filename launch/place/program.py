"""An external program that places jobs: that of SkyPilot, Slurm or Kubernetes."""

import os
import shutil
import subprocess
from collections.abc import Mapping

from core.errors import ConfigError, ExitCode


class Program:
    """An installed program.

    Args:
        name: Name or path of the program.
        key: Key of the setting that needs the program, for the error.
        value: Value of that setting.
        fix: How to install the program, for the error.

    Raises:
        ConfigError: The program is not installed.
    """

    def __init__(self, name: str, key: str, value: str, fix: str) -> None:
        path = shutil.which(name)
        if path is None:
            raise ConfigError(key, value, f"the program {name} is not installed here", fix)
        self.path = path

    def run(
        self, *words: str, text: str | None = None, env: Mapping[str, str] | None = None
    ) -> int:
        """Runs the program with its output on this terminal.

        Args:
            words: Arguments of the program.
            text: Standard input; None: empty.
            env: Variables besides those of this process.

        Returns:
            0, or 1 if the program failed.
        """
        env = {**os.environ, **(env or {})}
        done = subprocess.run([self.path, *words], input=text or "", encoding="utf-8", env=env)
        return ExitCode.FINISHED if done.returncode == 0 else ExitCode.FAILED

    def problem(self, *words: str) -> str | None:
        """Runs the program silently; returns the last line of its errors, or None on success."""
        done = subprocess.run([self.path, *words], capture_output=True, encoding="utf-8")
        if done.returncode == 0:
            return None
        return next(iter(done.stderr.splitlines()[-1:]), f"exit code {done.returncode}")

    def ask(self, *words: str) -> str:
        """Runs the program silently and returns its standard output."""
        done = subprocess.run([self.path, *words], capture_output=True, encoding="utf-8")
        return done.stdout
