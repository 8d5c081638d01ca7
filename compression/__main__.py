"""`python -m compression`: composes the configuration, then compresses."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from compression.command import COMPRESSION
from compression.config import CompressionConfig
from core.errors import ExitCode
from core.settings.command import Job


def _run(config: CompressionConfig, job: Job) -> int:
    from compression.auto import run_auto
    from compression.report import plot_pareto
    from compression.run import run

    if job.is_of_sweep and config.out is not None:  # each job of a sweep has a folder of its own
        config.out += f"/{config.recipe_name}"
    out = (run_auto if config.is_auto else run)(config, _stop_requested)
    if job.is_of_sweep and out is not None:
        plot_pareto(out)
    return ExitCode.FINISHED


_stopped = False


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopped
    _stopped = True


def _stop_requested() -> bool:
    return _stopped


def main() -> int:
    """Entry point; returns the exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars; ours are rich's
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
    return COMPRESSION.main(_run)


if __name__ == "__main__":
    sys.exit(main())
