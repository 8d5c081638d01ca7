"""The processes of one text stage: distribution of work, and replacement of dead processes."""

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
from serving.text.codec import TextError
from serving.text.tokenizer import TokenizerFiles

T = TypeVar("T")

_log = logging.getLogger("spotforge.serving")
_START_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 60.0  # even if the process is busy
_DEATHS_OF_A_MESSAGE = 3


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Waits for all works and returns their results, or raises the first error in their order."""
    found: list[T] = []
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found


class Work(ABC):
    """A unit of work that one process has: a prompt, or a sequence.

    Args:
        id: Id that is unique in the pool.
        load: Amount of work, relative to other works of the pool.

    Attributes:
        worker: Worker that has the work; None: no process is up, and the work waits for the next.
        answer: Last answer that was asked for; None: none was.
        asked_s: Time when the answer was asked for, by the monotonic clock.
        deaths: Number of processes that died while they owed this answer.
    """

    def __init__(self, id: int, load: int) -> None:
        self.id, self.load = id, load
        self.worker: Worker | None = None
        self.answer: asyncio.Future[Any] | None = None
        self.asked_s = 0.0
        self.deaths = 0

    @property
    def is_waiting(self) -> bool:
        """True if an answer was asked for and has not come."""
        return self.answer is not None and not self.answer.done()

    def ask(self) -> asyncio.Future[Any]:
        """Returns the future of the next answer."""
        self.answer, self.deaths = asyncio.get_running_loop().create_future(), 0
        self.asked_s = time.monotonic()
        return self.answer

    @abstractmethod
    def messages(self) -> list[tuple[str, Any]]:
        """Returns all messages that a new process needs in order to take over the work."""

    @abstractmethod
    def on_answer(self, content: Any) -> None:
        """Handles an answer of the process."""

    def fail(self, error: SpotforgeError) -> None:
        """Fails the answer that is waited for."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)


class Pool:
    """All processes of a stage.

    Args:
        stage: `encode` or `decode`.
        files: Files of the tokenizer.
        size: Number of processes.
        silence_s: Seconds after which a process that sends nothing and uses no CPU is replaced.
    """

    def __init__(self, stage: str, files: TokenizerFiles, size: int, silence_s: float) -> None:
        self.workers = [Worker(self, stage, i, files, silence_s) for i in range(size)]
        self._ids = itertools.count()
        self._waiting: dict[int, Work] = {}  # works that came while no process was up
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_ready(self) -> bool:
        """True if at least one process is up."""
        return any(worker.is_up for worker in self.workers)

    async def start(self) -> None:
        """Starts all processes; raises SpotforgeError if one does not come up."""
        await all_of([worker.launch() for worker in self.workers])
        self._tasks = [asyncio.create_task(worker.keep_up()) for worker in self.workers]

    def new_id(self) -> int:
        """Returns an id for a new work."""
        return next(self._ids)

    def add(self, work: Work) -> None:
        """Gives a work to the process with the lowest load."""
        up = [worker for worker in self.workers if worker.is_up]
        if up:
            min(up, key=lambda worker: worker.load).take(work)
        else:
            self._waiting[work.id] = work

    def remove(self, work: Work) -> None:
        """Removes a work that has ended or failed."""
        self._waiting.pop(work.id, None)
        if work.worker is not None:
            work.worker.drop(work)

    def on_up(self) -> None:
        """Distributes the works that waited for a process to come up."""
        waiting, self._waiting = self._waiting, {}
        for work in waiting.values():
            self.add(work)

    async def close(self) -> None:
        """Ends all processes; their works are lost."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        # Supervision has ended above, so that nothing restarts what is killed now.
        lost = [*self._waiting.values()]
        for worker in self.workers:
            lost += await worker.kill()
        for work in lost:
            work.fail(EngineError("the text stages were stopped"))


class Worker:
    """A place in a pool: a process, and its replacement when it has died.

    Attributes:
        is_up: True: the process has reported that it is ready.
        load: Load of all works that the process has.
        restarts: Number of times that a replacement was started.
        vocab_size: Size of the vocabulary that the process reported.
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
        """Id of the process that runs now; None: there is no process."""
        return None if self._child is None else self._child.pid

    def take(self, work: Work) -> None:
        """Starts a work, or takes it over from a process that died."""
        self._works[work.id], work.worker = work, self
        self.load += work.load
        for kind, content in work.messages():
            self.say(kind, content)

    def drop(self, work: Work) -> None:
        """Removes a work that has ended."""
        work.worker = None
        if self._works.pop(work.id, None) is not None:
            self.load -= work.load

    def say(self, kind: str, content: Any) -> None:
        """Sends a message to the process."""
        assert self._child is not None
        self._child.say(kind, content)

    async def launch(self) -> None:
        """Starts a process; raises SpotforgeError if it does not come up."""
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
        """Replaces the process whenever it dies or hangs."""
        await keep_up(self._name, _log, self._watch, self._end, self._launch_again)

    async def kill(self) -> list[Work]:
        """Kills the process; returns the works that it had."""
        self.is_up = False
        if self._child is not None:
            await self._child.kill()  # also handles the lines that it sent before
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
                return f"sent nothing and did nothing for {still_s:.1f} s"
            # A template may loop for ever, using CPU all the time: that is not silence.
            asked = [work.asked_s for work in self._works.values() if work.is_waiting]
            if asked and time.monotonic() - min(asked) > _ANSWER_TIMEOUT_S:
                return f"gave no answer for {_ANSWER_TIMEOUT_S:g} s"
        return await child.last_words()

    async def _end(self, why: str) -> None:
        for work in await self.kill():
            # Only works that waited for an answer may have caused the death.
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
                return  # the work has ended or failed in the meantime
            if kind == "refused":
                work.fail(TextError(*rest))
            elif kind == "failed":
                work.fail(EngineFailed(*rest))
            else:
                work.on_answer(rest)
