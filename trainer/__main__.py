"""`python -m trainer`: composes the configuration, then launches it."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from core.errors import ExitCode
from core.settings.command import Job
from trainer.command import TRAINER
from trainer.config import TrainerConfig


def _run(config: TrainerConfig, job: Job) -> int:
    if job.is_of_sweep:  # is a run of its own, named by what it changes
        config.run.name += f"/{job.change}"
        config.run.dir += f"/{job.change}"
    from trainer.launching import launch

    return launch(config, isolated=job.is_of_sweep, given=job.given)


def main() -> int:
    """Entry point; returns the exit code of the run."""
    return TRAINER.main(_run)


def _stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ends this process while it has nothing to save; what it does then need not end well."""
    name = signal.Signals(number).name
    said = f"{name} before training began: nothing was saved or lost; the same command starts it\n"
    os.write(2, said.encode())  # in the middle of anything, another write to stderr too
    os._exit(ExitCode.START_AGAIN)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _stop_at_once)
    sys.exit(main())
