"""Batches on Celery: the only file that imports it.

A message names a batch; everything else is in the folder, which the workers share with the
gateway. So a message that comes twice, or again while the first is still worked on, costs nothing:
workers share the lines. One that is lost is sent again when the gateway starts.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import httpx
from celery import Celery
from celery.exceptions import OperationalError
from kombu.exceptions import OperationalError as BrokerError
from starlette.types import ASGIApp

from serving.batches.ask import ask_over_http
from serving.batches.batches import Batches
from serving.batches.database import Database
from serving.batches.ledger import Ledger, Line
from serving.batches.runner import Reply, Runner

if TYPE_CHECKING:
    from serving.batches.worker import WorkerConfig

_TASK = "spotforge.run_batch"
_QUEUE = "spotforge.batches"
_CONNECT_TIMEOUT_S = 3.0
_RETRY_S = 5.0
_log = logging.getLogger("spotforge.serving")


class CeleryQueue:
    """Sends batches to workers.

    Args:
        batches: Of the folder.
        broker: URL of Redis or RabbitMQ.
    """

    def __init__(self, batches: Batches, broker: str) -> None:
        self._batches = batches
        self._app = _celery(broker, {"socket_connect_timeout": _CONNECT_TIMEOUT_S})
        self._resending: asyncio.Task[None] | None = None

    async def start(self, app: ASGIApp) -> None:
        """See `Queue`. A broker that is not there yet does not keep the gateway from starting."""
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
        """Workers go on."""

    async def close(self) -> None:
        """Likewise."""
        if self._resending is not None:
            self._resending.cancel()
            await asyncio.gather(self._resending, return_exceptions=True)
        await asyncio.to_thread(self._app.close)

    def _send(self, batch_id: str) -> None:
        try:
            self._app.send_task(_TASK, [batch_id], queue=_QUEUE, retry=False)
        except (OperationalError, BrokerError, OSError) as e:
            raise ConnectionError(f"the broker takes nothing: {e}") from e


def work(config: WorkerConfig, key: str | None) -> None:
    """Works until it is told to stop.

    Args:
        config: Settings.
        key: Of the gateway; None: it asks for none.
    """
    timeout_s = config.visibility_timeout_s
    # One that was not acknowledged in time goes to another worker, at once and not after minutes.
    options = {
        "visibility_timeout": timeout_s,
        "unacked_restore_interval": max(1.0, min(10.0, timeout_s / 4)),
        "unacked_restore_throttle": 1,
    }
    app = _celery(config.broker, options)

    def run_batch(batch_id: str) -> None:
        try:
            asyncio.run(_run(config, key, batch_id))
        except Exception:  # a full disk, a folder that went away, or is another gateway's
            _log.exception("%s: tried again later", batch_id)
            raise

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
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        broker_connection_timeout=_CONNECT_TIMEOUT_S,
        broker_transport_options=redis_options if broker.startswith("redis") else {},
        worker_hijack_root_logger=False,
    )
    return app
