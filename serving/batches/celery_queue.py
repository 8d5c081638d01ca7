"""Batches on Celery; no other file imports it.

A message contains the id of a batch; everything else is in the folder, which the workers share with
the gateway. So a message may come twice, also while the first one is being worked on: workers share
the lines. A message that was lost is sent again when the gateway starts.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
from celery import Celery
from celery.exceptions import OperationalError
from kombu.exceptions import OperationalError as BrokerError
from starlette.types import ASGIApp

from serving.batches.ask import ask_over_http
from serving.batches.batches import Batches
from serving.batches.config import WorkerConfig
from serving.batches.database import Database
from serving.batches.ledger import Ledger, Line
from serving.batches.runner import Reply, Runner

_TASK = "spotforge.run_batch"
_QUEUE = "spotforge.batches"
_CONNECT_TIMEOUT_S = 3.0
_RETRY_S = 5.0
_log = logging.getLogger("spotforge.serving")


class CeleryQueue:
    """Queue that sends batches to workers.

    Args:
        batches: Batches of the folder.
        broker: URL of Redis or RabbitMQ.
    """

    def __init__(self, batches: Batches, broker: str) -> None:
        self._batches = batches
        self._app = _celery(broker, {"socket_connect_timeout": _CONNECT_TIMEOUT_S})
        self._resending: asyncio.Task[None] | None = None

    async def start(self, app: ASGIApp) -> None:
        """See `Queue`. The gateway starts even if the broker cannot be reached yet."""
        self._resending = asyncio.create_task(self._resend())

    async def _resend(self) -> None:
        for batch_id in await asyncio.to_thread(self._batches.unfinished):
            while True:
                try:
                    await self.put(batch_id)
                    break
                except ConnectionError as e:
                    _log.warning("%s waits: %s", batch_id, e)
                    await asyncio.sleep(_RETRY_S)

    async def put(self, batch_id: str) -> None:
        """See `Queue`."""
        await asyncio.to_thread(self._send, batch_id)

    def stop(self) -> None:
        """Does nothing, since the workers go on."""

    async def close(self) -> None:
        """Closes the connection to the broker; the workers go on."""
        if self._resending is not None:
            self._resending.cancel()
            await asyncio.gather(self._resending, return_exceptions=True)
        await asyncio.to_thread(self._app.close)

    def _send(self, batch_id: str) -> None:
        try:
            self._app.send_task(_TASK, [batch_id], queue=_QUEUE, retry=False)
        except (OperationalError, BrokerError, OSError) as e:
            raise ConnectionError(f"the broker cannot be reached: {e}") from e


def work(config: WorkerConfig, key: str | None) -> None:
    """Works on batches until the process is told to stop.

    Args:
        config: Settings of the worker.
        key: API key for the gateway; None: the gateway needs no key.
    """
    timeout_s = config.visibility_timeout_s
    # A message that was not acknowledged in time goes to another worker. By default Celery may look
    # for such messages only minutes later.
    options = {
        "visibility_timeout": timeout_s,
        "unacked_restore_interval": max(1.0, min(10.0, timeout_s / 4)),
        "unacked_restore_throttle": 1,
    }
    app = _celery(config.broker, options)

    def run_batch(batch_id: str) -> None:
        try:
            asyncio.run(_run(config, key, batch_id))
        except Exception:  # a full disk, or a folder that is missing or another gateway's
            _log.exception("%s: failed, and is tried again later", batch_id)
            raise

    # Acknowledged after the work and not before, so that a batch outlives its worker; any error is
    # retried without a limit, since the batch has a deadline of its own.
    app.task(
        name=_TASK,
        acks_late=True,
        reject_on_worker_lost=True,
        ignore_result=True,
        autoretry_for=(Exception,),
        max_retries=None,
        retry_backoff=True,
    )(run_batch)
    app.worker_main(
        ["worker", "--loglevel=WARNING", f"--concurrency={config.batches}", f"--queues={_QUEUE}"]
        + ["--without-gossip", "--without-mingle", f"--hostname=batches-{config.name}@%h"]
    )


async def _run(config: WorkerConfig, key: str | None, batch_id: str) -> None:
    database = Database(config.folder())
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    timeout = httpx.Timeout(config.request_timeout_s, connect=10.0)
    gateway = config.gateway.removesuffix("/").removesuffix("/v1")
    try:
        async with httpx.AsyncClient(base_url=gateway, headers=headers, timeout=timeout) as client:

            async def ask(line: Line) -> Reply | None:
                return await ask_over_http(client, line)

            ledger = Ledger(database, config.lease_s)
            await Runner(ledger, ask, config.concurrency, config.max_lines).run(batch_id)
    finally:
        database.close()


def _celery(broker: str, redis_options: dict[str, Any]) -> Celery:
    app = Celery("spotforge", broker=broker)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,  # a worker takes no batch that it cannot start at once
        broker_connection_retry_on_startup=True,
        broker_connection_timeout=_CONNECT_TIMEOUT_S,
        broker_transport_options=redis_options if broker.startswith("redis") else {},
        worker_hijack_root_logger=False,
    )
    return app
