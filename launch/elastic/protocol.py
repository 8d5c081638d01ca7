"""The messages between the supervisor and a machine: one JSON object a line, over TCP.

    machine -> supervisor                        supervisor -> machine
                                                 Challenge
    Hello     who I am, with a proof             Welcome with a proof, or Refused with the reason
    Ready     ranks that I can run, a free port  Prepare
    Status    how my ranks are: on every change  Start, Stop (SIGTERM), Kill (SIGKILL)
              and each second                    Pong
    Stacks    what my ranks are doing            Dump
    Open      the port at which I answer probes  Listen
    Probed    how I reach the others             Probe
    Leaving   this machine goes away             Dismiss with the exit code to end with

The supervisor sends rank numbers, never a command: a machine runs the command it was started with.
Every message is checked field by field, since anything may connect to an open port; the proofs are
those of `token.py`.
"""

import asyncio
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

VERSION = 3
PING_S = 1.0
SILENCE_S = 10.0  # a machine that sends nothing for so long is lost
# Shorter than SILENCE_S: a machine that is cut off kills its ranks before the supervisor starts the
# next generation, so that two generations never write to one run directory.
SUPERVISOR_SILENCE_S = 8.0
MAX_LINE_BYTES = 4 * 2**20
MAX_HELLO_BYTES = 4 * 2**10  # before the peer has proved anything
MAX_TEXT_CHARS = 32 * 2**10  # limit for a traceback, and for the stacks of a rank


class ProtocolError(Exception):
    """A message from the peer that the protocol does not allow."""


@dataclass(frozen=True)
class RankStatus:
    """The status of one rank, as its machine sees it.

    Attributes:
        rank: Number of the rank among all ranks.
        phase: First word of the heartbeat, e.g. `starting` or `train`; None before the first one.
        step: Second word of the heartbeat.
        beat_at: Time of the last beat, in seconds of a monotonic clock.
        exit: Exit code, -N for signal N; None while the rank runs.
        ended_at: Time at which the rank wrote its error, else at which its exit was seen; same
            clock.
        error: Traceback that the rank wrote; None without one.
        stop_reason: Reason why this rank was told to stop; None if it was not.
    """

    rank: int
    phase: str | None = None
    step: int | None = None
    beat_at: float | None = None
    exit: int | None = None
    ended_at: float | None = None
    error: str | None = None
    stop_reason: str | None = None

    def on_clock_ahead_by(self, offset_s: float) -> "RankStatus":
        """Returns the same status with times of a clock that is `offset_s` ahead."""
        return replace(
            self,
            beat_at=None if self.beat_at is None else self.beat_at + offset_s,
            ended_at=None if self.ended_at is None else self.ended_at + offset_s,
        )


@dataclass(frozen=True)
class Challenge:
    version: int
    challenge: str


@dataclass(frozen=True)
class Hello:
    version: int
    nproc: int
    command_sha256: str
    address: str
    challenge: str
    proof: str
    # As `core.software` has it. Machines of version 2 do not send it, and are told their version.
    software: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    nproc: int
    port: int
    problem: str | None = None


@dataclass(frozen=True)
class Status:
    generation: int
    clock: float
    ranks: list[RankStatus]


@dataclass(frozen=True)
class Stacks:
    stacks: list[str]


@dataclass(frozen=True)
class Leaving:
    reason: str


@dataclass(frozen=True)
class Welcome:
    proof: str


@dataclass(frozen=True)
class Refused:
    reason: str


@dataclass(frozen=True)
class Prepare:
    pass


@dataclass(frozen=True)
class Start:
    generation: int
    group_rank: int
    first_rank: int
    nproc: int
    world_size: int
    master_addr: str
    master_port: int
    time: float  # of the supervisor, in Unix seconds


@dataclass(frozen=True)
class Stop:
    pass


@dataclass(frozen=True)
class Kill:
    pass


@dataclass(frozen=True)
class Dump:
    pass


@dataclass(frozen=True)
class Listen:
    address: str


@dataclass(frozen=True)
class Open:
    port: int | None
    token: str


@dataclass(frozen=True)
class Peer:
    """A machine that answers probes."""

    address: str
    port: int
    token: str


@dataclass(frozen=True)
class Probe:
    peers: list[Peer]


@dataclass(frozen=True)
class Way:
    """How one machine reaches another; see `parallel.network.Reach`."""

    problem: str | None
    mbit_per_s: float | None


@dataclass(frozen=True)
class Probed:
    ways: list[Way]


@dataclass(frozen=True)
class Pong:
    pass


@dataclass(frozen=True)
class Dismiss:
    code: int
    reason: str


Message = (
    Challenge
    | Hello
    | Ready
    | Status
    | Stacks
    | Leaving
    | Welcome
    | Refused
    | Prepare
    | Start
    | Stop
    | Kill
    | Dump
    | Listen
    | Open
    | Probe
    | Probed
    | Pong
    | Dismiss
)
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in typing.get_args(Message)}


def command_digest(command: Sequence[str]) -> str:
    """Returns the SHA-256 of a command's words, which must be equal on all machines of a gang."""
    return hashlib.sha256(json.dumps(list(command)).encode()).hexdigest()


def said_in(hello: Hello) -> tuple[object, ...]:
    """Returns what a machine says of itself, to be proved after the supervisor's challenge."""
    software = json.dumps(hello.software, sort_keys=True)
    return hello.challenge, hello.nproc, hello.command_sha256, hello.address, software


def encode(message: Message) -> bytes:
    """Returns a message as one line of JSON."""
    return json.dumps({"type": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Parses a message.

    Raises:
        ProtocolError: The line is not a message of this protocol.
    """
    try:
        content = json.loads(line)
        message: Message = _checked(content, _KINDS[content.pop("type")])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ProtocolError(f"not a message: {line[:40]!r}") from e
    return message


async def receive_first(reader: asyncio.StreamReader) -> Message:
    """Reads the only message that a peer sends before it is answered; see `receive`.

    A line of `receive` may have megabytes, which are not for a peer that has proved nothing yet.
    """
    line = b""
    while not line.endswith(b"\n"):
        if len(line) == MAX_HELLO_BYTES:
            raise ProtocolError(f"its first message has more than {MAX_HELLO_BYTES} bytes")
        more = await reader.read(MAX_HELLO_BYTES - len(line))
        if not more:
            raise EOFError
        line += more
    return decode(line)


async def receive(reader: asyncio.StreamReader) -> Message:
    """Reads the next message.

    Raises:
        ProtocolError: The line is too long or not a message of this protocol.
        EOFError: The peer closed the connection.
        OSError: The connection broke.
    """
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError as e:
        raise ProtocolError(f"a line of more than {MAX_LINE_BYTES} bytes") from e
    return decode(line)


def _checked(value: Any, hint: Any) -> Any:
    """Converts a JSON value to the type that `hint` names, and checks it strictly.

    Raises:
        TypeError: The value has another type, or an object lacks a field.
        KeyError: An object has an unknown field.
    """
    if is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint)
        return hint(**{name: _checked(item, hints[name]) for name, item in value.items()})
    if typing.get_origin(hint) is list:
        (of,) = typing.get_args(hint)
        return [_checked(item, of) for item in _checked(value, list)]
    if typing.get_origin(hint) is dict:
        _, of = typing.get_args(hint)  # keys of JSON are text
        return {name: _checked(item, of) for name, item in _checked(value, dict).items()}
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    # Not isinstance, by which a bool would pass as an int.
    if type(value) not in allowed:
        raise TypeError(f"{value!r} is not {hint}")
    return value
