"""Who works on batches: this process, or workers elsewhere."""

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
_LAST_COMMITS_S = 1.0  # for answers that came just now
_log = logging.getLogger("spotforge.serving")


class Queue(Protocol):
    """Where batches wait for somebody to work on them. One that is put twice does no harm."""

    async def start(self, app: ASGIApp) -> None:
        """Puts all that are unfinished: a crash may have lost them.

        Args:
            app: The gateway, which is ready.
        """
        ...

    async def put(self, batch_id: str) -> None:
        """Hands over a batch.

        Raises:
            ConnectionError: Nobody takes it.
        """
        ...

    def stop(self) -> None:
        """Begins nothing more."""
        ...

    async def close(self) -> None:
        """Ends what runs here; the next start goes on with it."""
        ...


class EmbeddedQueue:
    """Works on batches in the gateway's process.

    Args:
        batches: Of the folder.
        ledger: Likewise.
        concurrency: Lines at once.
        max_lines: Of a batch.
    """

    def __init__(self, batches: Batches, ledger: Ledger, concurrency: int, max_lines: int) -> None:
        self._batches, self._ledger = batches, ledger
        self._concurrency, self._max_lines = concurrency, max_lines
        self._runner: Runner | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, app: ASGIApp) -> None:
        """See `Queue`. Until then batches wait."""
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
        except Exception:  # a full disk, a folder that went away: nothing is lost by waiting
            _log.exception("%s: tried again in %g s", batch_id, _RETRY_S)
            await asyncio.sleep(_RETRY_S)
