"""Settings of a worker for batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omegaconf import MISSING

from core.errors import ConfigError
from core.settings.rules import setting
from serving.batches.database import DATABASE
from serving.config import BROKERS

_above_0 = partial(setting, above=0, below=math.inf, fix="give more")


@dataclass
class WorkerConfig:
    """Settings of a worker, as `key=value`.

    Attributes:
        dir: Value of the gateway's `batches.dir`.
        broker: Value of the gateway's `batches.broker`.
        gateway: Address of the gateway.
        name: Name of this worker, unique on its host.
        batches: Batches that the worker runs at once, each in a process.
        concurrency: Lines of each batch that are processed at once.
        max_lines: Lines of a batch, at most.
        request_timeout_s: Seconds for the answer to a line; must be more than the gateway's limit.
        visibility_timeout_s: Seconds after which Redis gives a batch to another worker as well, and
            so the delay after the loss of a worker's host.
        lease_s: Seconds without a sign of life after which a line goes to another worker.
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
        """Returns the folder of files and batches."""
        return Path(self.dir).expanduser()

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for invalid addresses, and for a folder without batches."""
        for name, kinds in (("broker", BROKERS), ("gateway", ("http", "https"))):
            if getattr(self, name).partition("://")[0] not in kinds:
                rule = f"must be a URL of {' | '.join(kinds)}"
                raise ConfigError(name, getattr(self, name), rule, f"give {kinds[0]}://HOST:PORT")
        if not (self.folder() / DATABASE).is_file():
            rule = "is not a gateway's folder of batches: it has no database"
            raise ConfigError("dir", self.dir, rule, "give the gateway's batches.dir")
