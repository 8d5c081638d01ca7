"""The parent's end of a child process that speaks JSON lines.

The child dies with its parent, however the parent ends: its standard input closes, and Linux
kills it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from core.errors import SpotforgeError
from core.process.child import describe_exit, spawn
from core.process.liveness import Liveness, Look

T = TypeVar("T")

_BLOCK_BYTES = 1 << 20
_LAST_WORDS_BYTES = 1_000
_encode = json.JSONEncoder(separators=(",", ":")).encode


class ChildEnded(SpotforgeError):
    """Reports that the process ended before it did what was awaited; its last words say why."""


class JsonChild:
    """Holds one child process from start to end; `json_lines.py` is the child's end of the pipes.

    Attributes:
        heard_s: Time of the last line from the child, by the monotonic clock.
        fatal: Reason for its end that the child itself reported; None if it reported none.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, hear: Callable[[str, Any], None]
    ) -> None:
        self._process, self._hear = process, hear
        self.heard_s = time.monotonic()
        self.fatal: str | None = None
        self._said: deque[str] = deque(maxlen=20)  # last lines of standard error
        self._reader = asyncio.create_task(self._read())
        self._errors = asyncio.create_task(self._read_errors())
        self._unsent: list[bytes] = []
        self._liveness = Liveness(process.pid)

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        hear: Callable[[str, Any], None],
        env: Mapping[str, str] | None = None,
    ) -> JsonChild:
        """Starts a process.

        Args:
            command: Program and its arguments.
            hear: Function called with the kind and the content of each line from the child.
            env: Environment of the child; None passes on this process's.
        """
        process = await spawn(
            command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_BLOCK_BYTES,
            env=env,
            # Ctrl-C is meant for this process. A group instead of a session: Linux divides CPU time
            # among sessions (autogroup), so a busy engine would take half of its gateway's share.
            process_group=0,
        )
        return cls(process, hear)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def say(self, kind: str, content: Any) -> None:
        """Writes a line to the child; lines of one turn of the event loop are one write."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._send)
        self._unsent.append(_encode({kind: content}).encode() + b"\n")

    def _send(self) -> None:
        stdin, lines = self._process.stdin, b"".join(self._unsent)
        self._unsent.clear()
        assert stdin is not None
        # A child that is gone is reported by its reader, not by the writer.
        if not stdin.is_closing():
            with contextlib.suppress(ConnectionError):
                stdin.write(lines)

    async def unless_it_ends(self, wanted: Awaitable[T]) -> T:
        """Returns the result of an awaitable, or raises if the process ends first.

        Raises:
            ChildEnded: The process ended first.
        """
        future = asyncio.ensure_future(wanted)
        try:
            await asyncio.wait([future, self._reader], return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise ChildEnded(await self.last_words())
            return future.result()
        finally:
            future.cancel()

    async def ends_within(self, seconds: float) -> bool:
        """Waits up to `seconds` for the child to close its output; returns whether it did."""
        await asyncio.wait([self._reader], timeout=seconds)
        return self._reader.done()

    def look(self) -> Look:
        """Returns how the child fares; call it every `LOOK_S`."""
        return self._liveness.look(self.heard_s)

    async def last_words(self) -> str:
        """Waits for the child's end and returns how it ended and the reason that it gave."""
        code = await self._process.wait()
        await self._errors
        said = self.fatal
        if said is None and code != -signal.SIGKILL:  # a killed process could not give a reason
            said = next((line for line in reversed(self._said) if line), None)
        ended = describe_exit(code)
        return f"{ended}: {said}" if said else f"{ended}, without a message"

    async def kill(self) -> None:
        """Kills the child and waits for its end."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        await asyncio.gather(self._reader, self._errors)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        try:
            while block := await self._process.stdout.read(_BLOCK_BYTES):
                self.heard_s = time.monotonic()
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    for kind, content in json.loads(line).items():
                        if kind == "fatal":
                            self.fatal = content
                        else:
                            self._hear(kind, content)
        except Exception as e:  # whatever is wrong with its output, only this child may fail for it
            self.fatal = f"its output is not valid: {type(e).__name__}: {e}"
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _read_errors(self) -> None:
        assert self._process.stderr is not None
        rest = b""
        while block := await self._process.stderr.read(_BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            self._said.extend(line.decode(errors="replace").rstrip() for line in lines)
            rest = rest[-_LAST_WORDS_BYTES:]  # a progress bar never ends its line
        # Of a progress bar, the text after the last carriage return is what a terminal would show.
        self._said.append(rest.decode(errors="replace").rpartition("\r")[2].rstrip())
