"""A worker for batches, on the gateway's host.

    SPOTFORGE_API_KEY=sf-... python -m serving.batches.worker \\
        dir=/srv/batches broker=redis://127.0.0.1:6379/0 gateway=http://127.0.0.1:8000
"""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import ConfigError, ExitCode
from serving.batches.database import DATABASE
from serving.config import BROKERS

_KEY = "SPOTFORGE_API_KEY"


@dataclass
class WorkerConfig:
    """Settings, as `key=value`.

    Attributes:
        dir: The gateway's `batches.dir`.
        broker: The gateway's `batches.broker`.
        gateway: Its address.
        name: Of this worker, where a host has several.
        batches: That it works on at once, each in a process.
        concurrency: Lines of each at once.
        max_lines: Of a batch.
        request_timeout_s: For the answer to a line; the gateway's own is to be shorter.
        visibility_timeout_s: Redis gives a batch to another worker, too, after so long: how late a
            batch goes on whose worker's host is gone.
        lease_s: A line goes to another worker when its own has not been heard of for so long.
    """

    dir: str = MISSING
    broker: str = MISSING
    gateway: str = MISSING
    name: str = "1"
    batches: int = 1
    concurrency: int = 8
    max_lines: int = 50_000
    request_timeout_s: float = 660.0
    visibility_timeout_s: float = 3600.0
    lease_s: float = 30.0

    def folder(self) -> Path:
        """Of files and batches."""
        return Path(self.dir).expanduser()

    def check(self) -> None:
        """Raises ConfigError for addresses that are none, and numbers that cannot be."""
        for key, kinds in (("broker", BROKERS), ("gateway", ("http", "https"))):
            if getattr(self, key).partition("://")[0] not in kinds:
                rule = f"is no URL of {' | '.join(kinds)}"
                raise ConfigError(key, getattr(self, key), rule, f"give {kinds[0]}://HOST:PORT")
        for key, value in vars(self).items():
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise ConfigError(key, value, "must be above 0, and a number", "give more")
        if not (self.folder() / DATABASE).is_file():
            rule = "holds no batches: no gateway keeps its own there"
            raise ConfigError("dir", self.dir, rule, "give the gateway's batches.dir")


_HELP = """\
Work on batches: python -m serving.batches.worker dir=DIR broker=URL gateway=URL [key=value ...]

  dir, broker                 the gateway's batches.dir and batches.broker
  gateway                     its address; its API key is in SPOTFORGE_API_KEY
  name                        of this worker, where a host has several
  batches, concurrency        batches at once, each in a process; lines of each at once
  max_lines, request_timeout_s, visibility_timeout_s, lease_s

SIGTERM gives what it works on to another worker. Exit code 2: refused.
"""


def main() -> None:
    """Entry point; ends the process with an exit code."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(_HELP)
        return
    try:
        given = OmegaConf.from_cli(sys.argv[1:])
        config: Any = OmegaConf.merge(OmegaConf.structured(WorkerConfig), given)
        for key in sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(key, "???", "is missing", f"set {key}=...")
        config = WorkerConfig(**config)
        config.check()
    except (ConfigError, OmegaConfBaseException) as e:
        print(str(e).splitlines()[0], file=sys.stderr)
        sys.exit(ExitCode.BAD_CONFIG)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    # Else Celery would end a batch first, which takes up to a day. So another worker gets it.
    os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")
    try:
        from serving.batches.celery_queue import work
    except ImportError as e:
        print(f"a worker needs Celery ({e}): pip install 'spotforge[queue]'", file=sys.stderr)
        sys.exit(ExitCode.BAD_CONFIG)
    work(config, os.environ.get(_KEY))


if __name__ == "__main__":
    main()
