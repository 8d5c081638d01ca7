"""A worker for batches, on the gateway's host: `python -m serving.batches.worker`."""

from __future__ import annotations

import logging
import os
import sys

from core.errors import ExitCode, MissingExtraError
from core.settings.command import Command, Job
from serving.batches.config import WorkerConfig

_KEY = "SPOTFORGE_API_KEY"

WORKER = Command(
    program="python -m serving.batches.worker",
    about="Work on batches, on the gateway's host.",
    schema=WorkerConfig,
    root="worker",
    examples=f"""
{_KEY}=sf-... python -m serving.batches.worker \\
    dir=/srv/batches broker=redis://127.0.0.1:6379/0 gateway=http://127.0.0.1:8000
""",
    notes=f"""
The API key for the gateway is in {_KEY}.
SIGTERM leaves the running lines to another worker. Exit code 2: settings refused.
""",
)


def _run(config: WorkerConfig, job: Job) -> int:
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    # By default Celery finishes a batch before it ends, which may take a day. With a cold shutdown
    # another worker gets it.
    os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")
    try:
        from serving.batches.celery_queue import work
    except ImportError as e:
        rule, fix = f"a worker needs Celery ({e})", "pip install 'spotforge[queue]'"
        raise MissingExtraError("broker", config.broker, rule, fix) from e
    work(config, os.environ.get(_KEY))
    return ExitCode.FINISHED


def main() -> int:
    """Runs the worker; returns the exit code."""
    return WORKER.main(_run)


if __name__ == "__main__":
    sys.exit(main())
