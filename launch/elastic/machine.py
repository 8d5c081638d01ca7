"""One machine's side of the gang: offers ranks, starts them, tells how they are.

The supervisor has one in its own process for the machine that it runs on, and `agent.py` puts one
behind a connection: both answer the same messages.
"""

import asyncio
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

from core.process.gpus import NoAnswer, visible_gpus_async
from launch.elastic.gang import Gang
from launch.elastic.protocol import (
    PING_S,
    Dump,
    Kill,
    Message,
    Prepare,
    ProtocolError,
    RankStatus,
    Ready,
    Stacks,
    Start,
    Status,
    Stop,
)


class Machine:
    """Does what the supervisor says, and never more: the command is its own.

    Args:
        command: What each rank runs.
        nproc: Ranks on this machine; None: as many as there are GPUs.
        send: Takes what is to be told to the supervisor.
    """

    def __init__(
        self, command: Sequence[str], nproc: int | None, send: Callable[[Message], None]
    ) -> None:
        self._command, self._nproc, self._send = command, nproc, send
        self._had_gpus = False
        self._offered = 0
        self._gang: Gang | None = None
        self._told: list[RankStatus] = []
        self._told_at = 0.0
        self._jobs: set[asyncio.Task[None]] = set()
        self._folder = Path(tempfile.mkdtemp(prefix="spotforge-ranks-"))

    async def offer(self) -> tuple[int, str | None]:
        """How many ranks this machine can run now; when none, why."""
        if self._nproc is not None:
            return self._nproc, None
        try:
            gpus = await visible_gpus_async()
        except NoAnswer as e:
            return 0, str(e)
        if not gpus and self._had_gpus:
            return 0, "no GPU is left"
        self._had_gpus = bool(gpus)
        return max(1, len(gpus)), None

    def receive(self, message: Message) -> None:
        """Does what `message` says.

        Raises:
            ProtocolError: It asks for ranks that were not offered.
        """
        match message:
            case Prepare():
                self._begin(self._prepare())
            case Start():
                if message.nproc != self._offered:
                    raise ProtocolError(f"asked to start {message.nproc} ranks")
                self._close_gang()
                self._gang = Gang(self._command, message, self._folder)
            case Stop() if self._gang:
                self._gang.signal(signal.SIGTERM)
            case Kill() if self._gang:
                self._gang.signal(signal.SIGKILL)
            case Dump() if self._gang:
                self._begin(self._dump(self._gang))

    def poll(self) -> None:
        """Looks after the ranks; to be called about ten times a second."""
        for job in [job for job in self._jobs if job.done()]:
            self._jobs.remove(job)
            job.result()  # an error in it is ours
        ranks = self._gang.status() if self._gang else []
        now = time.monotonic()
        if ranks != self._told or now >= self._told_at + PING_S:
            self._told, self._told_at = ranks, now
            self._send(Status(self._gang.generation if self._gang else 0, now, ranks))

    @property
    def is_running(self) -> bool:
        """Whether a rank runs."""
        return self._gang is not None and any(r.exit is None for r in self._gang.status())

    def close(self) -> None:
        """Kills the ranks and leaves nothing behind."""
        for job in self._jobs:
            job.cancel()
        self._close_gang()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, job: Coroutine[None, None, None]) -> None:
        self._jobs.add(asyncio.ensure_future(job))

    def _close_gang(self) -> None:
        if self._gang is not None:
            self._gang.close()
            self._gang = None

    async def _prepare(self) -> None:
        self._offered, problem = await self.offer()
        with socket.socket() as s:
            s.bind(("", 0))
            port: int = s.getsockname()[1]
        self._send(Ready(self._offered, port, problem))

    async def _dump(self, gang: Gang) -> None:
        self._send(Stacks(await gang.stacks()))
