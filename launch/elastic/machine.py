"""One machine's side of the protocol: offers ranks, starts them, and reports their status.

The supervisor has a `Machine` in its own process for the machine it runs on; `agent.py` runs one
behind a connection. Both answer the same messages.
"""

import asyncio
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path

from core.process.gpus import NoAnswer, visible_gpus_async
from launch.elastic.gang import Gang
from launch.elastic.protocol import (
    PING_S,
    Dump,
    Kill,
    Listen,
    Message,
    Open,
    Peer,
    Prepare,
    Probe,
    Probed,
    ProtocolError,
    RankStatus,
    Ready,
    Stacks,
    Start,
    Status,
    Stop,
    Way,
)
from parallel.network import answering, new_token, probe

_PROBE_BYTES = 2**20


class Machine:
    """Runs ranks as the supervisor's messages say. The command is local and never received.

    Args:
        command: Command that each rank runs.
        nproc: Ranks on this machine; None: one for each GPU, else 1.
        send: Function that sends a message to the supervisor.
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
        self._answering = ExitStack()  # probes of other machines
        self._folder = Path(tempfile.mkdtemp(prefix="spotforge-ranks-"))

    async def offer(self) -> tuple[int, str | None]:
        """Returns the number of ranks that this machine can run now; if 0, also the reason."""
        if self._nproc is not None:
            return self._nproc, None
        try:
            gpus = await visible_gpus_async()
        except NoAnswer as e:
            return 0, str(e)
        # A machine that has lost its GPUs must not offer a rank on the CPU instead.
        if not gpus and self._had_gpus:
            return 0, "no GPU is left"
        self._had_gpus = bool(gpus)
        return max(1, len(gpus)), None

    def receive(self, message: Message) -> None:
        """Acts on a message from the supervisor.

        Raises:
            ProtocolError: The message asks for ranks that were not offered.
        """
        match message:
            case Prepare():
                self._begin(self._prepare())
            case Start():
                if message.nproc != self._offered:
                    raise ProtocolError(f"asked to start {message.nproc} ranks, not the offer")
                self._close_gang()
                self._answering.close()  # all have probed
                self._gang = Gang(self._command, message, self._folder)
            case Stop() if self._gang:
                self._gang.signal(signal.SIGTERM)
            case Kill() if self._gang:
                self._gang.signal(signal.SIGKILL)
            case Dump() if self._gang:
                self._begin(self._dump(self._gang))
            case Listen():
                self._listen(message.address)
            case Probe():
                self._begin(self._probe(message.peers))

    def poll(self) -> None:
        """Reports the ranks if their status changed or a ping is due; call it every 0.1 s."""
        for job in [job for job in self._jobs if job.done()]:
            self._jobs.remove(job)
            job.result()  # raises what went wrong in it
        ranks = self._gang.status() if self._gang else []
        now = time.monotonic()
        if ranks != self._told or now >= self._told_at + PING_S:
            self._told, self._told_at = ranks, now
            self._send(Status(self._gang.generation if self._gang else 0, now, ranks))

    @property
    def is_running(self) -> bool:
        """True while a rank runs."""
        return self._gang is not None and any(r.exit is None for r in self._gang.status())

    @property
    def silence_s(self) -> float:
        """Seconds since the newest beat of any rank; 0 if no rank beats."""
        ranks = self._gang.status() if self._gang else []
        beats = [rank.beat_at for rank in ranks if rank.beat_at is not None]
        return time.monotonic() - max(beats) if beats else 0.0

    def close(self) -> None:
        """Kills the ranks and removes their files."""
        for job in self._jobs:
            job.cancel()
        self._answering.close()
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
        # A free port for torch's rendezvous, in case this node becomes the head. Another program
        # could take it before rank 0 does; the generation would then fail and start again.
        with socket.socket() as s:
            s.bind(("", 0))
            port: int = s.getsockname()[1]
        self._send(Ready(self._offered, port, problem))

    def _listen(self, address: str) -> None:
        self._answering.close()
        token = new_token()
        try:
            port = self._answering.enter_context(answering(address, token, _PROBE_BYTES))
        except OSError:  # the machine has lost the address by which it joined
            self._send(Open(None, token))
        else:
            self._send(Open(port, token))

    async def _probe(self, peers: Sequence[Peer]) -> None:
        def ask(peer: Peer) -> Way:
            return Way(*probe(peer.address, peer.port, peer.token, _PROBE_BYTES))

        ways = await asyncio.gather(*(asyncio.to_thread(ask, peer) for peer in peers))
        self._send(Probed(list(ways)))

    async def _dump(self, gang: Gang) -> None:
        self._send(Stacks(await gang.stacks()))
