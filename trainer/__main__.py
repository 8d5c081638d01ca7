"""`python -m trainer`: composes the configuration, then launches it."""

import os
import signal
import sys

from core.errors import ExitCode
from trainer.command import TRAINER
from trainer.config import TrainerConfig


def _run(config: TrainerConfig, change: str | None) -> int:
    is_sweep = change is not None
    if is_sweep:  # each job of a sweep is a run of its own, named by what it changes
        config.run.name += f"/{change}"
        config.run.dir += f"/{change}"
    from trainer.launching import launch

    return launch(config, isolated=is_sweep)


def main() -> int:
    """Entry point; returns the exit code of the run."""
    return TRAINER.main(_run)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until there is something to save
        signal.signal(number, lambda *_: os._exit(ExitCode.START_AGAIN))
    sys.exit(main())
