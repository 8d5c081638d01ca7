"""Runs a batch until no lines are left; any number of workers may run the same batch."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from serving.batches.ledger import Ledger, Line, Nothing

_UNREACHABLE_S = 1.0  # between two tries to reach the gateway
_LOOK_AGAIN_S = 0.2  # between two looks for lines that other workers have given up
_LONGEST_WAIT_S = 30.0  # between two checks whether a line is still wanted
_MAX_LOST = 3  # tries of a request that loses the engine, which it must not do for a whole day


@dataclass(frozen=True)
class Reply:
    """The gateway's reply to a request.

    Attributes:
        status: HTTP status.
        request_id: Gateway's id of the request; may be empty.
        body: Body as JSON.
        retry_after_s: Seconds after which a retry makes sense; None: it never does.
    """

    status: int
    request_id: str
    body: Any
    retry_after_s: float | None = None

    @property
    def is_lost(self) -> bool:
        """True if the request was admitted and then lost by the engine."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return isinstance(error, dict) and error.get("code") == "engine"


Ask = Callable[[Line], Awaitable[Reply | None]]
"""Sends a line to the gateway; None: the gateway cannot be reached now."""


class Runner:
    """Runs the lines of batches.

    Args:
        ledger: Ledger of the lines.
        ask: Function that sends a line to the gateway.
        concurrency: Lines that are processed at once, of all batches together.
        max_lines: Lines of a batch, at most.
    """

    def __init__(self, ledger: Ledger, ask: Ask, concurrency: int, max_lines: int) -> None:
        self._ledger, self._ask, self._max_lines = ledger, ask, max_lines
        self._free = asyncio.Semaphore(concurrency)
        self._is_stopping = False

    def stop(self) -> None:
        """Stops starting lines; `run` returns when the started ones have ended."""
        self._is_stopping = True

    async def run(self, batch_id: str) -> None:
        """Runs a batch until it has ended, or `stop` is called.

        If the task is cancelled, answers of started lines are not committed.

        Raises:
            LookupError: There is no such batch.
            OSError: The folder cannot be read or written.
            sqlite3.Error: The database cannot be read or written.
        """
        worker = uuid.uuid4().hex
        await asyncio.to_thread(self._ledger.prepare, batch_id, self._max_lines)
        # One task renews all claims of this worker: lines may wait longer than a lease.
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
            # The place is acquired before the line, or lines would be claimed and then wait.
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
        """Sends a line until the reply is final, and commits it.

        Returns False if the answer is no longer wanted.
        """
        lost = 0
        while True:
            reply = await self._ask(line)
            if reply is not None:
                lost += reply.is_lost
                if reply.retry_after_s is None or lost == _MAX_LOST:
                    break
            wait_s = _UNREACHABLE_S
            # A long Retry-After is cut, to notice soon that the batch was cancelled.
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
            await asyncio.sleep(self._ledger.lease_s / 3)  # two renewals may come late
            await asyncio.to_thread(self._ledger.renew, worker)
