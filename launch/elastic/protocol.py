"""What the supervisor and a machine say to each other: one JSON object a line, over TCP.

    machine -> supervisor                        supervisor -> machine
    Hello     who I am                           Welcome, or Refused with the reason
    Ready     ranks that I can run, a free port  Prepare
    Status    how my ranks are: on every change  Start, Stop (SIGTERM), Kill (SIGKILL)
              and each second                    Pong
    Stacks    what my ranks are doing            Dump
    Leaving   this machine goes away             Dismiss with the exit code to end with

The supervisor sends rank numbers, never a command: a machine runs the one it was started with.
Whatever arrives is checked field by field, since anything may connect to an open port.
"""

import asyncio
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

VERSION = 1
PING_S = 1.0
SILENCE_S = 10.0  # a machine that says nothing for so long is lost
# It kills its ranks before that, so that they do not write beside those of the next start.
SUPERVISOR_SILENCE_S = 8.0
MAX_LINE_BYTES = 4 * 2**20
MAX_TEXT_CHARS = 32 * 2**10  # of a traceback or of the stacks of a rank


class ProtocolError(Exception):
    """The peer said something that is none of our messages."""


@dataclass(frozen=True)
class RankStatus:
    """One rank, as its machine sees it.

    Attributes:
        rank: Number among all ranks.
        phase: First word of its heartbeat, e.g. `starting` or `train`; None before the first one.
        step: Second word of its heartbeat.
        beat_at: When it last beat, in seconds of a monotonic clock.
        exit: Exit code, -N for signal N; None while it runs.
        ended_at: When it wrote its error, else when its exit was seen; same clock.
        error: Traceback that it left.
        stop_reason: Why it was told to stop, if it was.
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
        """The same, told by a clock that is `offset_s` ahead."""
        return replace(
            self,
            beat_at=None if self.beat_at is None else self.beat_at + offset_s,
            ended_at=None if self.ended_at is None else self.ended_at + offset_s,
        )


@dataclass(frozen=True)
class Hello:
    version: int
    nproc: int
    command_sha256: str
    address: str


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
    pass


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
class Pong:
    pass


@dataclass(frozen=True)
class Dismiss:
    code: int
    reason: str


Message = (
    Hello
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
    | Pong
    | Dismiss
)
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in typing.get_args(Message)}


def command_digest(command: Sequence[str]) -> str:
    """SHA-256 of a command's words: machines of one gang must run the same."""
    return hashlib.sha256(json.dumps(list(command)).encode()).hexdigest()


def encode(message: Message) -> bytes:
    """A message as one line."""
    return json.dumps({"type": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message in a line.

    Raises:
        ProtocolError: It is none of ours.
    """
    try:
        content = json.loads(line)
        message: Message = _checked(content, _KINDS[content.pop("type")])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ProtocolError(f"not a message: {line[:40]!r}") from e
    return message


async def receive(reader: asyncio.StreamReader) -> Message:
    """Reads the next message.

    Raises:
        ProtocolError: What came is none of ours.
        EOFError: The peer closed the connection.
        OSError: The connection broke.
    """
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError as e:
        raise ProtocolError(f"a line of more than {MAX_LINE_BYTES} bytes") from e
    return decode(line)


def _checked(value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` names.

    Raises:
        TypeError, KeyError: It is of another type, or has a field too many or too few.
    """
    if is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint)
        return hint(**{name: _checked(item, hints[name]) for name, item in value.items()})
    if typing.get_origin(hint) is list:
        (of,) = typing.get_args(hint)
        return [_checked(item, of) for item in _checked(value, list)]
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) not in allowed:
        raise TypeError(f"{value!r} is not {hint}")
    return value
