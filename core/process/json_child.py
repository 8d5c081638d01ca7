"""A child process that talks in lines of JSON, as seen from its parent.

It dies with the parent, however that ends: its standard input closes, and Linux kills it.
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
    """The process ended before it did what was waited for; its last words say why."""


class JsonChild:
    """One process, from its start to its end; its own end of the pipes is `json_lines.py`.

    Attributes:
        heard_s: When there was a line, by the monotonic clock.
        fatal: Why it ends, where it said so itself.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, hear: Callable[[str, Any], None]
    ) -> None:
        self._process, self._hear = process, hear
        self.heard_s = time.monotonic()
        self.fatal: str | None = None
        self._said: deque[str] = deque(maxlen=20)  # the last lines of standard error
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
            command: Program and arguments.
            hear: Called with the kind and the content of each line that it says.
            env: Its environment; None: this process's.
        """
        process = await spawn(
            command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_BLOCK_BYTES,
            env=env,
            # Ctrl-C is for this process. Not a session: Linux shares a CPU among sessions, and an
            # engine that is busy would have its gateway wait for its half.
            process_group=0,
        )
        return cls(process, hear)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def say(self, kind: str, content: Any) -> None:
        """Writes a line to it; all of one turn of the event loop are one write."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._send)
        self._unsent.append(_encode({kind: content}).encode() + b"\n")

    def _send(self) -> None:
        stdin, lines = self._process.stdin, b"".join(self._unsent)
        self._unsent.clear()
        assert stdin is not None
        if not stdin.is_closing():
            with contextlib.suppress(ConnectionError):
                stdin.write(lines)

    async def unless_it_ends(self, wanted: Awaitable[T]) -> T:
        """Waits for something that the process is to do.

        Raises:
            ChildEnded: The process ended before.
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
        """Waits for its last line, and returns whether that came by then."""
        await asyncio.wait([self._reader], timeout=seconds)
        return self._reader.done()

    def look(self) -> Look:
        """Returns how it fares; to be asked every `LOOK_S`."""
        return self._liveness.look(self.heard_s)

    async def last_words(self) -> str:
        """Waits for its end, and returns how it ended and what it said of that."""
        code = await self._process.wait()
        await self._errors
        said = self.fatal
        if said is None and code != -signal.SIGKILL:  # who is killed has no words for it
            said = next((line for line in reversed(self._said) if line), None)
        ended = describe_exit(code)
        return f"{ended}: {said}" if said else f"{ended}, and said nothing"

    async def kill(self) -> None:
        """Kills it, and waits for its end."""
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
        except Exception as e:  # whatever a process says, its end is what it costs
            self.fatal = f"what it said makes no sense: {type(e).__name__}: {e}"
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _read_errors(self) -> None:
        assert self._process.stderr is not None
        rest = b""
        while block := await self._process.stderr.read(_BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            self._said.extend(line.decode(errors="replace").rstrip() for line in lines)
            rest = rest[-_LAST_WORDS_BYTES:]  # a bar of progress never ends its line
        self._said.append(rest.decode(errors="replace").rpartition("\r")[2].rstrip())
