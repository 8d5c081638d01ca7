"""SkyPilot as a program: its pins clash with ours, so it lives in an environment of its own."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from launch.place.job import Job
from monitoring.errors import ConfigError, ExitCode


class SkyProgram:
    """Runs `sky`.

    Args:
        program: Its name or path.

    Raises:
        ConfigError: There is no such program.
    """

    def __init__(self, program: str) -> None:
        self._program = shutil.which(program)
        if self._program is None:
            fix = "pip install 'skypilot[aws,gcp]==0.14.1' in an environment of its own"
            raise ConfigError("--sky", program, "no such program", fix)

    def run(self, *words: str) -> int:
        """Runs it, with its output on this terminal.

        Returns:
            0, or 1 where it failed.
        """
        assert self._program is not None
        code = subprocess.run([self._program, *words]).returncode
        return ExitCode.FINISHED if code == 0 else ExitCode.FAILED

    def launch(self, job: Job, task: str) -> int:
        """Starts a managed job.

        Args:
            job: What it is.
            task: Its YAML.

        Raises:
            ConfigError: A secret has no value here, or no cloud of the job can be reached.
        """
        for name in job.launch.secrets:
            if not os.environ.get(name):
                rule = "no such environment variable here"
                raise ConfigError("launch.secrets", name, rule, f"export {name}=...")
        self._check_credentials(job)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{job.name}.yaml"
            path.write_text(task, encoding="utf-8")
            secrets = [word for name in job.launch.secrets for word in ("--secret", name)]
            words = ["--yes", "--detach-run", "--name", job.name, *secrets, str(path)]
            return self.run("jobs", "launch", *words)

    def _check_credentials(self, job: Job) -> None:
        """Refuses where SkyPilot can use none of the job's clouds."""
        from launch.place.skypilot import infra

        assert self._program is not None
        clouds = sorted({infra(way).partition("/")[0] for way in job.candidates})
        checked = subprocess.run(
            [self._program, "check", *clouds], capture_output=True, text=True, check=False
        )
        if checked.returncode != 0:
            rule = f"no credentials for any of {', '.join(clouds)}"
            raise ConfigError("launch.clouds", clouds, rule, f"see: sky check {' '.join(clouds)}")
