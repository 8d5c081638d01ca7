"""Works on one batch until nothing is left of it; any number of workers may do so at once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from serving.batches.ledger import Ledger, Line, Nothing

_UNREACHABLE_S = 1.0  # before a gateway that was not there is asked again
_LOOK_AGAIN_S = 0.2  # whether others have done what they work on
_LONGEST_WAIT_S = 30.0  # before it is seen whether a line is still wanted
_MAX_LOST = 3  # a request that kills the engine must not do so for a day


@dataclass(frozen=True)
class Reply:
    """What the gateway said to a request.

    Attributes:
        status: HTTP status.
        request_id: Of the gateway; may be empty.
        body: JSON.
        retry_after_s: Where it pays to come back.
    """

    status: int
    request_id: str
    body: Any
    retry_after_s: float | None = None

    @property
    def is_lost(self) -> bool:
        """Whether it was let in, and then the engine failed."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return isinstance(error, dict) and error.get("code") == "engine"


Ask = Callable[[Line], Awaitable[Reply | None]]
"""Sends a line to the gateway; None: the gateway cannot be reached now."""


class Runner:
    """Asks what the lines of batches ask.

    Args:
        ledger: What is done.
        ask: Sends a line to the gateway.
        concurrency: Lines at once, of all batches together.
        max_lines: A file of more is refused.
    """

    def __init__(self, ledger: Ledger, ask: Ask, concurrency: int, max_lines: int) -> None:
        self._ledger, self._ask, self._max_lines = ledger, ask, max_lines
        self._free = asyncio.Semaphore(concurrency)
        self._is_stopping = False

    def stop(self) -> None:
        """Begins no more lines; `run` returns when those that it works on have ended."""
        self._is_stopping = True

    async def run(self, batch_id: str) -> None:
        """Until the batch has ended, or `stop`. What it had begun when cancelled is not committed.

        Raises:
            LookupError: There is no such batch.
            OSError: The folder cannot be read or written.
            sqlite3.Error: Likewise.
        """
        worker = uuid.uuid4().hex
        await asyncio.to_thread(self._ledger.prepare, batch_id, self._max_lines)
        renewing = asyncio.create_task(self._renew(worker))
        try:
            async with asyncio.TaskGroup() as lines:
                await self._begin_lines(batch_id, worker, lines)
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            await asyncio.to_thread(self._ledger.release, worker)
        if not self._is_stopping:
            await asyncio.to_thread(self._ledger.finish, batch_id)

    async def _begin_lines(self, batch_id: str, worker: str, lines: asyncio.TaskGroup) -> None:
        while not self._is_stopping:
            await self._free.acquire()
            taken: Line | Nothing = Nothing.CLAIMED
            try:
                if not self._is_stopping:
                    taken = await asyncio.to_thread(self._ledger.take, batch_id, worker)
            finally:
                if isinstance(taken, Nothing):
                    self._free.release()
            if taken is Nothing.LEFT:
                return
            if isinstance(taken, Line):
                lines.create_task(self._answer_and_free(taken, worker))
            else:
                await asyncio.sleep(_LOOK_AGAIN_S)

    async def _answer_and_free(self, line: Line, worker: str) -> None:
        try:
            if not await self._answer(line):
                await asyncio.to_thread(self._ledger.give_up, line, worker)
        finally:
            self._free.release()

    async def _answer(self, line: Line) -> bool:
        """Asks until there is an answer that asking again would not better, and commits it.

        False where nobody waits for one any more.
        """
        lost = 0
        while True:
            reply = await self._ask(line)
            if reply is not None:
                lost += reply.is_lost
                if reply.retry_after_s is None or lost == _MAX_LOST:
                    break
            wait_s = _UNREACHABLE_S
            if reply is not None:
                wait_s = min(reply.retry_after_s or 0.0, _LONGEST_WAIT_S)
            if self._is_stopping or not await asyncio.to_thread(self._ledger.is_wanted, line):
                return False
            await asyncio.sleep(wait_s)
        response = {
            "status_code": reply.status,
            "request_id": reply.request_id,
            "body": reply.body,
        }
        await asyncio.to_thread(self._ledger.commit, line, response)
        return True

    async def _renew(self, worker: str) -> None:
        while True:
            await asyncio.sleep(self._ledger.lease_s / 3)
            await asyncio.to_thread(self._ledger.renew, worker)
