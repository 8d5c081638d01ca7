"""The machines of the gang as the supervisor sees them, and the port at which they join."""

import asyncio
import ipaddress
import time
from collections.abc import Callable

from launch.elastic.protocol import (
    MAX_LINE_BYTES,
    SILENCE_S,
    VERSION,
    Dismiss,
    Hello,
    Leaving,
    Message,
    Pong,
    ProtocolError,
    RankStatus,
    Ready,
    Refused,
    Stacks,
    Start,
    Status,
    Welcome,
    encode,
    receive,
)

_GOODBYE_S = 2.0


class Node:
    """One machine: what it last told, and a way to tell it something.

    Attributes:
        name: As it is called in messages.
        address: Where other machines reach it; loopback if it shares the supervisor's.
        nproc: Ranks that it can run.
        ready: Its answer to the last Prepare.
        ranks: How the ranks of its last start are.
        stacks: Its answer to the last Dump.
        leaving: Why it goes away, once it said so.
        lost: Why it is gone, once it is.
    """

    def __init__(
        self, name: str, address: str, nproc: int, send: Callable[[Message], None]
    ) -> None:
        self.name, self.address, self.nproc = name, address, nproc
        self.ready: Ready | None = None
        self.ranks: list[RankStatus] = []
        self.stacks: list[str] | None = None
        self.leaving: str | None = None
        self.lost: str | None = None
        self._generation = 0
        self._send = send

    def send(self, message: Message) -> None:
        """Tells the machine something; one that is gone hears nothing."""
        if self.lost is None:
            self._send(message)

    def start(self, start: Start) -> None:
        """Starts its ranks of a generation."""
        self._generation = start.generation
        self.ranks = [RankStatus(start.first_rank + i) for i in range(start.nproc)]
        self.stacks = None
        self.send(start)

    def receive(self, message: Message) -> None:
        """Takes what the machine tells.

        Raises:
            ProtocolError: That makes no sense.
        """
        match message:
            case Ready():
                self.ready, self.nproc = message, _checked_nproc(message.nproc)
            case Status() if message.generation == self._generation:
                offset_s = time.monotonic() - message.clock
                ranks = [rank.on_clock_ahead_by(offset_s) for rank in message.ranks]
                if [r.rank for r in ranks] != [r.rank for r in self.ranks]:
                    raise ProtocolError("told of ranks that are not its own")
                self.ranks = ranks
            case Stacks():
                self.stacks = message.stacks
            case Leaving():
                self.leaving = message.reason

    @property
    def is_running(self) -> bool:
        """Whether a rank of it runs."""
        return any(rank.exit is None for rank in self.ranks)


class Listener:
    """Takes in machines that join, and keeps their nodes up to date.

    Args:
        digest: `command_digest` that a machine must have.
        joined: Called with each new node.
        changed: Set whenever a node changes.
        say: Takes a line about one that was refused.
    """

    def __init__(
        self,
        digest: str,
        joined: Callable[[Node], None],
        changed: asyncio.Event,
        say: Callable[[str], None],
    ) -> None:
        self._digest, self._joined, self._changed, self._say = digest, joined, changed, say
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.address = "127.0.0.1"  # of this machine, as seen by the others

    async def open(self, host: str, port: int) -> str:
        """Listens.

        Returns:
            Where: `host:port`.

        Raises:
            OSError: The port is taken, or the host is none of this machine's.
        """
        self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_LINE_BYTES)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def close(self) -> None:
        """Stops listening, and waits a moment for the machines to hear what they were told last."""
        if self._server is not None:
            self._server.close()
        if self._connections:
            _, pending = await asyncio.wait(self._connections, timeout=_GOODBYE_S)
            for connection in pending:
                connection.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        node: Node | None = None
        lost = "closed the connection"
        try:
            node = await self._greet(reader, writer)
            while node is not None:
                message = await asyncio.wait_for(receive(reader), SILENCE_S)
                node.receive(message)
                if isinstance(message, Status):
                    writer.write(encode(Pong()))
                self._changed.set()
        except TimeoutError:
            lost = f"silent for {SILENCE_S:.0f} s"
        except ProtocolError as e:
            lost = str(e)
            if node is None:
                self._say(f"refused {_peer(writer)}: {e}")
        except (EOFError, OSError):
            pass
        finally:
            self._connections.discard(connection)
            writer.close()
            if node is not None:
                node.lost = lost
                self._changed.set()

    async def _greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Node | None:
        """The new node; None where the peer is not to be one, which it is told."""
        hello = await asyncio.wait_for(receive(reader), SILENCE_S)
        if not isinstance(hello, Hello):
            raise ProtocolError("it does not say hello")
        if problem := self._problem(hello):
            self._say(f"refused {_peer(writer)}: {problem}")
            writer.write(encode(Refused(problem)))
            await asyncio.wait_for(reader.read(1), _GOODBYE_S)
            return None
        address = _checked_address(hello.address)
        if not ipaddress.ip_address(address).is_loopback:
            self.address = writer.get_extra_info("sockname")[0]

        def send(message: Message) -> None:
            writer.write(encode(message))

        node = Node(f"node {_peer(writer)}", address, _checked_nproc(hello.nproc), send)
        node.send(Welcome())
        self._joined(node)
        return node

    def _problem(self, hello: Hello) -> str | None:
        if hello.version != VERSION:
            return f"it speaks version {hello.version}, this supervisor {VERSION}"
        if hello.command_sha256 != self._digest:
            return "its command after -- differs from the supervisor's"
        return None


def dismiss(node: Node, code: int, reason: str) -> None:
    """Sends a machine home with an exit code; it is not a node any more."""
    node.send(Dismiss(code, reason))
    node.lost = reason


def _peer(writer: asyncio.StreamWriter) -> str:
    peername = writer.get_extra_info("peername")
    return str(peername[0]) if peername else "a peer that is gone"


def _checked_nproc(nproc: int) -> int:
    if not 0 <= nproc <= 1024:
        raise ProtocolError(f"{nproc} ranks on one machine")
    return nproc


def _checked_address(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError as e:
        raise ProtocolError(f"not an address: {address[:40]!r}") from e
