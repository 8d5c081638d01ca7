"""A worker for batches, on the gateway's host: `python -m serving.batches.worker`."""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omegaconf import MISSING

from core.errors import ConfigError, ExitCode, MissingExtraError
from core.settings.command import Command, Job
from core.settings.rules import setting
from serving.batches.database import DATABASE
from serving.config import BROKERS

_KEY = "SPOTFORGE_API_KEY"
_above_0 = partial(setting, above=0, below=math.inf, fix="give more")


@dataclass
class WorkerConfig:
    """Settings, as `key=value`.

    Attributes:
        dir: The gateway's `batches.dir`.
        broker: The gateway's `batches.broker`.
        gateway: The gateway's address.
        name: Name of this worker, where a host has several.
        batches: Batches that it works on at once, each in a process.
        concurrency: Lines of each batch at once.
        max_lines: Lines of a batch, at most.
        request_timeout_s: Seconds for the answer to a line; the gateway's own limit is to be
            shorter.
        visibility_timeout_s: Seconds after which Redis gives a batch to another worker, too: how
            late a batch goes on whose worker's host is gone.
        lease_s: Seconds after which a line goes to another worker when its own has not been heard
            of.
    """

    dir: str = MISSING
    broker: str = MISSING
    gateway: str = MISSING
    name: str = "1"
    batches: int = _above_0(1)
    concurrency: int = _above_0(8)
    max_lines: int = _above_0(50_000)
    request_timeout_s: float = _above_0(660.0)
    visibility_timeout_s: float = _above_0(3600.0)
    lease_s: float = _above_0(30.0)

    def folder(self) -> Path:
        """Of files and batches."""
        return Path(self.dir).expanduser()

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for addresses that are none, and a folder without batches."""
        for name, kinds in (("broker", BROKERS), ("gateway", ("http", "https"))):
            if getattr(self, name).partition("://")[0] not in kinds:
                rule = f"is no URL of {' | '.join(kinds)}"
                raise ConfigError(name, getattr(self, name), rule, f"give {kinds[0]}://HOST:PORT")
        if not (self.folder() / DATABASE).is_file():
            rule = "holds no batches: no gateway keeps its own there"
            raise ConfigError("dir", self.dir, rule, "give the gateway's batches.dir")


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
SIGTERM gives what it works on to another worker. Exit code 2: refused.
""",
)


def _run(config: WorkerConfig, job: Job) -> int:
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    # Else Celery would end a batch first, which takes up to a day. So another worker gets it.
    os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")
    try:
        from serving.batches.celery_queue import work
    except ImportError as e:
        rule, fix = f"a worker needs Celery ({e})", "pip install 'spotforge[queue]'"
        raise MissingExtraError("broker", config.broker, rule, fix) from e
    work(config, os.environ.get(_KEY))
    return ExitCode.FINISHED


def main() -> int:
    """Entry point; returns the exit code."""
    return WORKER.main(_run)


if __name__ == "__main__":
    sys.exit(main())
