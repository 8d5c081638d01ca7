"""A program of someone else's that places jobs: SkyPilot's, Slurm's, Kubernetes'."""

import shutil
import subprocess

from core.errors import ConfigError, ExitCode


class Program:
    """Runs it, with its output on this terminal.

    Args:
        name: Its name or path.
        key: The setting that asks for it.
        value: Its value.
        fix: How one gets it.

    Raises:
        ConfigError: There is no such program.
    """

    def __init__(self, name: str, key: str, value: str, fix: str) -> None:
        path = shutil.which(name)
        if path is None:
            raise ConfigError(key, value, f"there is no program {name} here", fix)
        self.path = path

    def run(self, *words: str, text: str | None = None) -> int:
        """Runs it.

        Args:
            words: After its name.
            text: What it reads; None: nothing.

        Returns:
            0, or 1 where it failed.
        """
        done = subprocess.run([self.path, *words], input=text or "", encoding="utf-8")
        return ExitCode.FINISHED if done.returncode == 0 else ExitCode.FAILED

    def problem(self, *words: str) -> str | None:
        """What it says where it fails, in a line; None where it does not."""
        done = subprocess.run([self.path, *words], capture_output=True, encoding="utf-8")
        if done.returncode == 0:
            return None
        return next(iter(done.stderr.splitlines()[-1:]), f"exit code {done.returncode}")

    def ask(self, *words: str) -> str:
        """What it prints, which is not shown."""
        done = subprocess.run([self.path, *words], capture_output=True, encoding="utf-8")
        return done.stdout
