"""Queues of batches: the interface, and the queue that works in the gateway's process."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Protocol

from starlette.types import ASGIApp

from serving.batches.ask import ask_app
from serving.batches.batches import Batches
from serving.batches.ledger import Ledger
from serving.batches.runner import Runner

_RETRY_S = 5.0
_LAST_COMMITS_S = 1.0  # time to commit answers that have just come
_log = logging.getLogger("spotforge.serving")


class Queue(Protocol):
    """Queue of batches; putting a batch twice does no harm."""

    async def start(self, app: ASGIApp) -> None:
        """Puts all unfinished batches, since a crash may have lost them.

        Args:
            app: App of the gateway, which is ready.
        """
        ...

    async def put(self, batch_id: str) -> None:
        """Queues a batch.

        Raises:
            ConnectionError: The broker cannot be reached.
        """
        ...

    def stop(self) -> None:
        """Stops starting lines."""
        ...

    async def close(self) -> None:
        """Ends the work in this process; the next start goes on with it."""
        ...


class EmbeddedQueue:
    """Queue that works on batches in the gateway's process.

    Args:
        batches: Batches of the folder.
        ledger: Lines of the batches.
        concurrency: Lines that are processed at once.
        max_lines: Lines of a batch, at most.
    """

    def __init__(self, batches: Batches, ledger: Ledger, concurrency: int, max_lines: int) -> None:
        self._batches, self._ledger = batches, ledger
        self._concurrency, self._max_lines = concurrency, max_lines
        self._runner: Runner | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, app: ASGIApp) -> None:
        """See `Queue`. Batches that were put before wait until this is called."""
        ask = partial(ask_app, app)
        self._runner = Runner(self._ledger, ask, self._concurrency, self._max_lines)
        for batch_id in await asyncio.to_thread(self._batches.unfinished):
            await self.put(batch_id)

    async def put(self, batch_id: str) -> None:
        """See `Queue`."""
        if self._runner is not None and batch_id not in self._tasks:
            task = asyncio.create_task(_run(self._runner, batch_id))
            self._tasks[batch_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(batch_id))

    def stop(self) -> None:
        """See `Queue`."""
        if self._runner is not None:
            self._runner.stop()

    async def close(self) -> None:
        """See `Queue`."""
        tasks = list(self._tasks.values())
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_COMMITS_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(runner: Runner, batch_id: str) -> None:
    while True:
        try:
            return await runner.run(batch_id)
        except Exception:  # e.g. a full disk or a missing folder: waiting loses nothing
            _log.exception("%s: failed, and is tried again in %g s", batch_id, _RETRY_S)
            await asyncio.sleep(_RETRY_S)
