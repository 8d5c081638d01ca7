"""The processes of one text stage: who does what, and who takes over when one dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from core.errors import SpotforgeError
from core.process.json_child import JsonChild
from core.process.keep_up import keep_up
from core.process.liveness import LOOK_S
from core.process.python import environment, python
from serving.engine import EngineError, EngineFailed
from serving.text.stages import TextError
from serving.text.tokenizer import TokenizerFiles

T = TypeVar("T")

_log = logging.getLogger("spotforge.serving")
_START_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 60.0  # however busy it is
_DEATHS_OF_A_MESSAGE = 3


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results, once all have ended; raises the error of the first that has one."""
    found: list[T] = []
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found


class Work(ABC):
    """What is at one process: a prompt, or a sequence.

    Args:
        id: Unique in its pool.
        load: How much it is, beside other works of the pool.

    Attributes:
        worker: That has it; None: nobody lives, so it waits for the next.
        answer: That is waited for, or was.
        asked_s: When its answer was asked for, by the monotonic clock.
        deaths: Of processes that were to give this answer.
    """

    def __init__(self, id: int, load: int) -> None:
        self.id, self.load = id, load
        self.worker: Worker | None = None
        self.answer: asyncio.Future[Any] | None = None
        self.asked_s = 0.0
        self.deaths = 0

    @property
    def is_waiting(self) -> bool:
        """Whether an answer is to come."""
        return self.answer is not None and not self.answer.done()

    def ask(self) -> asyncio.Future[Any]:
        """A place for the next answer."""
        self.answer, self.deaths = asyncio.get_running_loop().create_future(), 0
        self.asked_s = time.monotonic()
        return self.answer

    @abstractmethod
    def messages(self) -> list[tuple[str, Any]]:
        """All that a process has to hear which knows nothing of it."""

    @abstractmethod
    def on_answer(self, content: Any) -> None:
        """The process has answered."""

    def fail(self, error: SpotforgeError) -> None:
        """There will be no answer."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)


class Pool:
    """All processes of a stage.

    Args:
        stage: `encode` or `decode`.
        files: Of the tokenizer.
        size: Number of processes.
        silence_s: One that says and does nothing for so long is replaced.
    """

    def __init__(self, stage: str, files: TokenizerFiles, size: int, silence_s: float) -> None:
        self.workers = [Worker(self, stage, i, files, silence_s) for i in range(size)]
        self._ids = itertools.count()
        self._waiting: dict[int, Work] = {}  # nobody lives
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_ready(self) -> bool:
        """Whether one lives."""
        return any(worker.is_up for worker in self.workers)

    async def start(self) -> None:
        """Starts all; raises SpotforgeError where one does not come up."""
        await all_of([worker.launch() for worker in self.workers])
        self._tasks = [asyncio.create_task(worker.keep_up()) for worker in self.workers]

    def new_id(self) -> int:
        """For one more work."""
        return next(self._ids)

    def add(self, work: Work) -> None:
        """Hands it to the process with the least to do."""
        up = [worker for worker in self.workers if worker.is_up]
        if up:
            min(up, key=lambda worker: worker.load).take(work)
        else:
            self._waiting[work.id] = work

    def remove(self, work: Work) -> None:
        """It has ended, well or not."""
        self._waiting.pop(work.id, None)
        if work.worker is not None:
            work.worker.drop(work)

    def on_up(self) -> None:
        """One came up."""
        waiting, self._waiting = self._waiting, {}
        for work in waiting.values():
            self.add(work)

    async def close(self) -> None:
        """Ends all; what they have is lost."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        lost = [*self._waiting.values()]
        for worker in self.workers:
            lost += await worker.kill()
        for work in lost:
            work.fail(EngineError("the text stages were stopped"))


class Worker:
    """One place in a pool: a process, and the next one when that died.

    Attributes:
        is_up: A process is there and has said that it is ready.
        load: Of all works that it has.
        restarts: Times that another process was started.
        vocab_size: As the process says.
    """

    def __init__(
        self, pool: Pool, stage: str, index: int, files: TokenizerFiles, silence_s: float
    ) -> None:
        self._pool, self._files, self._silence_s = pool, files, silence_s
        self._command = python("-m", "serving.text.worker", stage)
        self._name = f"text: {stage} {index}"
        self._child: JsonChild | None = None
        self._ready: asyncio.Future[int] | None = None
        self._works: dict[int, Work] = {}
        self.is_up = False
        self.load = self.restarts = self.vocab_size = 0

    @property
    def pid(self) -> int | None:
        """Of the process that is there now."""
        return None if self._child is None else self._child.pid

    def take(self, work: Work) -> None:
        """Begins a work, or goes on with it in another process's place."""
        self._works[work.id], work.worker = work, self
        self.load += work.load
        for kind, content in work.messages():
            self.say(kind, content)

    def drop(self, work: Work) -> None:
        """It has ended."""
        work.worker = None
        if self._works.pop(work.id, None) is not None:
            self.load -= work.load

    def say(self, kind: str, content: Any) -> None:
        """A line for the process."""
        assert self._child is not None
        self._child.say(kind, content)

    async def launch(self) -> None:
        """Starts a process; raises SpotforgeError where it does not come up."""
        self._ready = asyncio.get_running_loop().create_future()
        self._child = await JsonChild.start(self._command, self._hear, environment())
        self._child.say("files", dataclasses.asdict(self._files))
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                self.vocab_size = await self._child.unless_it_ends(self._ready)
        except TimeoutError as e:
            await self.kill()
            text = f"{self._name}: was not ready within {_START_TIMEOUT_S:g} s"
            raise SpotforgeError(text) from e
        except BaseException:
            await self.kill()
            raise
        self.is_up = True
        self._pool.on_up()

    async def keep_up(self) -> None:
        """Replaces the process whenever it died or hung."""
        await keep_up(self._name, _log, self._watch, self._end, self._launch_again)

    async def kill(self) -> list[Work]:
        """Ends the process; returns what it had."""
        self.is_up = False
        if self._child is not None:
            await self._child.kill()  # what it said until then counts
            self._child = None
        works, self._works, self.load = list(self._works.values()), {}, 0
        for work in works:
            work.worker = None
        return works

    async def _watch(self) -> str:
        child = self._child
        assert child is not None
        while not await child.ends_within(LOOK_S):
            if (still_s := child.look().still_s) > self._silence_s:
                return f"said nothing and did nothing for {still_s:.1f} s"
            asked = [work.asked_s for work in self._works.values() if work.is_waiting]
            if asked and time.monotonic() - min(asked) > _ANSWER_TIMEOUT_S:
                return f"gave no answer for {_ANSWER_TIMEOUT_S:g} s"
        return await child.last_words()

    async def _end(self, why: str) -> None:
        for work in await self.kill():
            work.deaths += work.is_waiting
            if work.deaths >= _DEATHS_OF_A_MESSAGE:
                work.fail(EngineError(f"{work.deaths} processes ended with it: {why}"))
            else:
                work.asked_s = time.monotonic()
                self._pool.add(work)

    async def _launch_again(self) -> None:
        self.restarts += 1
        await self.launch()

    def _hear(self, kind: str, content: Any) -> None:
        if kind == "ready":
            assert self._ready is not None
            self._ready.set_result(content)
        elif kind != "idle":
            id, *rest = content
            work = self._works.get(id)
            if work is None or not work.is_waiting:
                return  # nobody waits for it any more
            if kind == "refused":
                work.fail(TextError(*rest))
            elif kind == "failed":
                work.fail(EngineFailed(*rest))
            else:
                work.on_answer(rest)
