"""The supervisor's view of its machines, and the port at which they join."""

import asyncio
import ipaddress
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

from core.software import CODE, difference
from launch.elastic.protocol import (
    MAX_LINE_BYTES,
    SILENCE_S,
    VERSION,
    Challenge,
    Dismiss,
    Hello,
    Leaving,
    Message,
    Open,
    Pong,
    Probed,
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
    receive_first,
    said_in,
)
from launch.elastic.reach import Apart
from launch.elastic.token import OPTION, is_proof, new_challenge, proof_of
from parallel.launcher import TOKEN_VARIABLE

_GOODBYE_S = 2.0
_MAX_STRANGERS = 64  # connections at once that have proved nothing yet
_SAID_REFUSALS = 10  # from then on only each tenfold number is said: the port may be scanned


class Node:
    """One machine: its last reports, and a function to send messages to it.

    Attributes:
        name: Name of the machine in output.
        address: Address for other machines; loopback if it is the supervisor's machine.
        nproc: Number of ranks that the machine can run.
        software: Software that the machine has told.
        ready: Answer to the last Prepare; None before it.
        ranks: Status of the ranks of the last start.
        stacks: Answer to the last Dump; None before it.
        open: Answer to the last Listen; None before it.
        probed: Answer to the last Probe; None before it.
        apart: State of a machine that others cannot reach; it is left out.
        leaving: Reason why the machine goes away; None if it does not.
        lost: Reason why the machine is gone; None while it is connected.
    """

    def __init__(
        self, name: str, address: str, nproc: int, send: Callable[[Message], None]
    ) -> None:
        self.name, self.address, self.nproc = name, address, nproc
        self.software: dict[str, str] = {}
        self.ready: Ready | None = None
        self.ranks: list[RankStatus] = []
        self.stacks: list[str] | None = None
        self.open: Open | None = None
        self.probed: Probed | None = None
        self.apart = Apart()
        self.leaving: str | None = None
        self.lost: str | None = None
        self._generation = 0
        self._send = send

    def address_seen_from(self, supervisor: str) -> str:
        """Returns the address at which other machines reach this one.

        Args:
            supervisor: Address of the supervisor's machine for the others. A node on that machine
                has connected over loopback, an address that the others cannot use.
        """
        return supervisor if ipaddress.ip_address(self.address).is_loopback else self.address

    def send(self, message: Message) -> None:
        """Sends a message; does nothing if the machine is gone."""
        if self.lost is None:
            self._send(message)

    def start(self, start: Start) -> None:
        """Starts the machine's ranks of a generation."""
        self._generation = start.generation
        self.ranks = [RankStatus(start.first_rank + i) for i in range(start.nproc)]
        self.stacks = None
        self.send(start)

    def receive(self, message: Message) -> None:
        """Takes in a message from the machine.

        Raises:
            ProtocolError: The message has an impossible number of ranks, or ranks of others.
        """
        match message:
            case Ready():
                self.ready, self.nproc = message, _checked_nproc(message.nproc)
            # A status of an earlier generation may still be on its way: it is ignored.
            case Status() if message.generation == self._generation:
                # Monotonic clocks of two machines have different origins.
                offset_s = time.monotonic() - message.clock
                ranks = [rank.on_clock_ahead_by(offset_s) for rank in message.ranks]
                if [r.rank for r in ranks] != [r.rank for r in self.ranks]:
                    raise ProtocolError("it reports ranks that it was not asked to start")
                self.ranks = ranks
            case Stacks():
                self.stacks = message.stacks
            case Leaving():
                self.leaving = message.reason
            case Open():
                self.open = message
            case Probed():
                self.probed = message

    @property
    def is_running(self) -> bool:
        """True while a rank runs on the machine, by its last report."""
        return any(rank.exit is None for rank in self.ranks)


class Listener:
    """Accepts machines that join, and keeps their nodes up to date.

    Args:
        digest: Value of `command_digest` that a machine must send.
        token: Token that a machine must prove to have; None: any machine may join.
        software: Software of this machine; see `core.software`.
        has_ranks: True if ranks run on this machine, too: others must have the same software. False
            if it only supervises: they must have the same code, while all else, such as torch, need
            not be here, and must be the same as on the first machine that has joined.
        joined: Function that is called with each new node.
        changed: Event that is set whenever a node changes.
        say: Function that prints a line about a refused machine.
    """

    def __init__(
        self,
        digest: str,
        token: str | None,
        software: Mapping[str, str],
        has_ranks: bool,
        joined: Callable[[Node], None],
        changed: asyncio.Event,
        say: Callable[[str], None],
    ) -> None:
        self._digest, self._token = digest, token
        self._code, self._has_ranks = {CODE: software[CODE]}, has_ranks
        self._in_use = [software] if has_ranks else []  # by machines with ranks, as they came
        self._joined, self._changed, self._say = joined, changed, say
        self._num_strangers = 0
        self._refused: Counter[str] = Counter()  # by the reason
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.address = "127.0.0.1"  # address of this machine for the others

    async def open(self, host: str, port: int) -> str:
        """Starts to listen.

        Returns:
            The address, as `host:port`.

        Raises:
            OSError: The port is in use, or the host is not an address of this machine.
        """
        self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_LINE_BYTES)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def close(self) -> None:
        """Stops listening, and waits a moment until the machines have received their dismissal."""
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
            node = await self._admit(reader, writer)
            while node is not None:
                message = await asyncio.wait_for(receive(reader), SILENCE_S)
                node.receive(message)
                if isinstance(message, Status):
                    writer.write(encode(Pong()))
                self._changed.set()
        except TimeoutError:
            lost = f"silent for {SILENCE_S:.0f} s"
            if node is None:
                self._note_refusal(writer, lost)
        except ProtocolError as e:
            lost = str(e)
            if node is None:
                self._note_refusal(writer, lost, "another protocol")
        except (EOFError, OSError):
            if node is None:
                self._note_refusal(writer, "closed the connection before it said who it is")
        finally:
            self._connections.discard(connection)
            writer.close()
            if node is not None:
                self._in_use.remove(node.software)
                node.lost = lost
                self._changed.set()

    async def _admit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Node | None:
        """Greets a peer, unless too many others are still being greeted."""
        if self._num_strangers >= _MAX_STRANGERS:
            raise ProtocolError(f"{_MAX_STRANGERS} others have connected and said nothing yet")
        self._num_strangers += 1
        try:
            return await self._greet(reader, writer)
        finally:
            self._num_strangers -= 1

    async def _greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Node | None:
        """Returns the new node; None if the peer is refused, which it is told."""
        challenge = new_challenge()
        writer.write(encode(Challenge(VERSION, challenge)))
        hello = await asyncio.wait_for(receive_first(reader), SILENCE_S)
        if not isinstance(hello, Hello):
            raise ProtocolError("its first message is not Hello")
        if problem := self._problem(hello, challenge):
            self._note_refusal(writer, problem)
            writer.write(encode(Refused(problem)))
            # Closing at once could reset the connection before the peer has read the reason.
            with suppress(TimeoutError, OSError):
                await asyncio.wait_for(reader.read(1), _GOODBYE_S)
            return None
        address = _checked_address(hello.address)
        # The local end of a connection from elsewhere is an address that others can reach.
        if not ipaddress.ip_address(address).is_loopback:
            self.address = writer.get_extra_info("sockname")[0]

        def send(message: Message) -> None:
            writer.write(encode(message))

        node = Node(f"node {_peer(writer)}", address, _checked_nproc(hello.nproc), send)
        node.software = hello.software
        self._in_use.append(node.software)
        node.send(Welcome(proof_of(self._token, "supervisor", hello.challenge, challenge)))
        self._joined(node)
        return node

    def _note_refusal(
        self, writer: asyncio.StreamWriter, problem: str, reason: str | None = None
    ) -> None:
        """Counts a refusal by its reason, so that scans of the port hide no wrong token.

        Without `reason` it is what `problem` says before its first colon.
        """
        reason = reason or problem.partition(":")[0]
        self._refused[reason] += 1
        number = self._refused[reason]
        if number <= _SAID_REFUSALS or number == 10 ** (len(str(number)) - 1):
            so_far = f" ({number} of this kind so far)" if number > 1 else ""
            self._say(f"refused {_peer(writer)}: {problem}{so_far}")

    def _problem(self, hello: Hello, challenge: str) -> str | None:
        if hello.version != VERSION:
            # Without its number: a stranger who made up many would have each counted and printed.
            return f"its protocol has another version than this supervisor's, {VERSION}"
        if not is_proof(hello.proof, self._token, "machine", challenge, *said_in(hello)):
            return f"it lacks the supervisor's token: give it {TOKEN_VARIABLE}, or {OPTION}"
        if hello.command_sha256 != self._digest:
            return "its command after -- differs from the supervisor's"
        return self._other_software(hello.software)

    def _other_software(self, found: Mapping[str, str]) -> str | None:
        # Another code or torch in a gang would end the job, or compute something else.
        expected = self._in_use[0] if self._in_use else {**found, **self._code}
        differing = difference(found, expected)
        if differing is None:
            return None
        its, others = differing
        who = "the supervisor" if self._has_ranks or not self._in_use else "the others"
        return f"other software: it has {its}, {who} {others}"


def dismiss(node: Node, code: int, reason: str) -> None:
    """Tells a machine to end with an exit code, and marks its node as lost."""
    node.send(Dismiss(code, reason))
    node.lost = reason


def _peer(writer: asyncio.StreamWriter) -> str:
    peername = writer.get_extra_info("peername")
    return str(peername[0]) if peername else "a peer that is gone"


def _checked_nproc(nproc: int) -> int:
    if not 0 <= nproc <= 1024:
        raise ProtocolError(f"nproc={nproc} is not from 0 to 1024")
    return nproc


def _checked_address(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError as e:
        raise ProtocolError(f"not an address: {address[:40]!r}") from e
