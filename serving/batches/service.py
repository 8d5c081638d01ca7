"""Opens the gateway's folder of batches and its queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.errors import MissingExtraError
from serving.batches.batches import Batches
from serving.batches.database import Database
from serving.batches.ledger import Ledger
from serving.batches.queue import EmbeddedQueue, Queue
from serving.config import BatchesConfig


@dataclass(frozen=True)
class BatchService:
    """The database of files and batches, and the queue that works on them."""

    database: Database
    queue: Queue


def open_batches(config: BatchesConfig) -> BatchService | None:
    """Opens the folder and its queue; returns None if the settings name no folder.

    Raises:
        ConfigError: The folder cannot be used, or Celery is not installed.
    """
    if config.dir is None:
        return None
    database = Database(Path(config.dir).expanduser())
    if config.broker is None:
        queue: Queue = EmbeddedQueue(
            Batches(database),
            Ledger(database, config.lease_s or 30.0),
            config.concurrency or 8,
            config.max_lines or 50_000,
        )
    else:
        try:
            from serving.batches.celery_queue import CeleryQueue
        except ImportError as e:
            rule, fix = "needs Celery", "pip install 'spotforge[queue]', or leave it out"
            raise MissingExtraError("batches.broker", config.broker, rule, fix) from e
        queue = CeleryQueue(Batches(database), config.broker)
    return BatchService(database, queue)
