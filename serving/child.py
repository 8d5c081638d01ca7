"""A child process that talks in lines of JSON: engines are such, and so are text stages.

It dies with the gateway, however that ends: its standard input closes, and Linux kills it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from core.errors import SpotforgeError

T = TypeVar("T")

_log = logging.getLogger("spotforge.serving")
_STABLE_S = 60.0  # a process that lived this long has not failed in a row
_BACKOFF_S = (0.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # by failures in a row
_BLOCK_BYTES = 1 << 20
_LAST_WORDS_BYTES = 1_000
LOOK_S = 0.25  # between two looks at a child
_LATE_S = 0.15  # beyond it this process stood still itself, which says nothing of its child
_NANOSECONDS = 1e9
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_encode = json.JSONEncoder(separators=(",", ":")).encode


class ChildEnded(SpotforgeError):
    """The process ended before it did what was waited for; its last words say why."""


class Look(NamedTuple):
    """What a look at a child shows.

    Attributes:
        had_s: Seconds since the last look that the child had for whatever it does: without those
            that it waited for a CPU, and those that this process was too late to look.
        still_s: That it had in a row, said nothing, used no CPU time and waited for nothing.
        silent_s: That it had since it said something.
    """

    had_s: float
    still_s: float
    silent_s: float


class _Threads(NamedTuple):
    """Of a process, all together.

    Attributes:
        used_s: CPU time of those that are there, in seconds.
        waited_s: For a CPU, by thread; a wait counts once it is over.
        wants: One of them runs, waits for a CPU, or for a disk.
    """

    used_s: float
    waited_s: dict[str, float]
    wants: bool


class Child:
    """One process, from its start to its end.

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
        self._still_s = self._silent_s = 0.0
        self._looked_s, self._heard_at_look_s = time.monotonic(), self.heard_s
        self._threads = _Threads(0.0, {}, False)

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        hear: Callable[[str, Any], None],
        env: dict[str, str] | None = None,
    ) -> Child:
        """Starts a process.

        Args:
            command: Program and arguments.
            hear: Called with the kind and the content of each line that it says.
            env: Its environment; None: this process's.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_BLOCK_BYTES,
            env=env,
            preexec_fn=_die_with_parent,
            # Ctrl-C is for the gateway, which drains. Not a session: Linux shares a CPU among
            # sessions, and an engine that is busy would have the gateway wait for its half.
            process_group=0,
        )
        return cls(process, hear)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def say(self, kind: str, content: Any) -> None:
        """A line for it; all of one turn of the event loop are one write."""
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
        """What is waited for.

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
        """Whether it said its last line by then."""
        await asyncio.wait([self._reader], timeout=seconds)
        return self._reader.done()

    def look(self) -> Look:
        """How it fares; to be asked every `LOOK_S`.

        On a host with more to do than it can, both this process and the child stand still now and
        then, and neither is a sign that the child hangs.
        """
        now_s, before = time.monotonic(), self._threads
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        threads = self._threads = _threads_of(self.pid)
        waited_s = [s - before.waited_s.get(name, 0.0) for name, s in threads.waited_s.items()]
        has_waited = max(waited_s, default=0.0) > 0
        is_late = passed_s > LOOK_S + _LATE_S
        had_s = 0.0 if is_late else max(0.0, passed_s - max(waited_s, default=0.0))
        if self.heard_s != self._heard_at_look_s:
            self._heard_at_look_s, self._silent_s = self.heard_s, 0.0
        else:
            self._silent_s += had_s
        if self._silent_s == 0 or threads.wants or has_waited or threads.used_s != before.used_s:
            self._still_s = 0.0
        else:
            self._still_s += had_s
        return Look(had_s, self._still_s, self._silent_s)

    async def last_words(self) -> str:
        """How it ended, and what it said of that; waits for its end."""
        code = await self._process.wait()
        await self._errors
        said = self.fatal
        if said is None and code != -signal.SIGKILL:  # who is killed has no words for it
            said = next((line for line in reversed(self._said) if line), None)
        ended = f"killed by signal {-code}" if code < 0 else f"ended with {code}"
        return f"{ended}: {said}" if said else f"{ended}, and said nothing"

    async def kill(self) -> None:
        """Ends it, at once."""
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


async def keep_up(
    name: str,
    watch: Callable[[], Awaitable[str]],
    end: Callable[[str], Awaitable[None]],
    start: Callable[[], Awaitable[None]],
) -> None:
    """Starts a child again whenever it died or hung, until this is cancelled.

    Args:
        name: For the log.
        watch: Returns why the process that is there is not to be kept, once that is so.
        end: Ends the process, and hands over what it had; it is told why.
        start: Starts another; raises SpotforgeError where that does not come up.
    """
    failures = 0  # in a row
    while True:
        began_s = time.monotonic()
        why = await watch()
        _log.warning("%s: %s; it is started again", name, why)
        await end(why)
        failures = 0 if time.monotonic() - began_s > _STABLE_S else failures + 1
        is_up = False
        while not is_up:
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            began_s = time.monotonic()
            try:
                await start()
                is_up = True
            except SpotforgeError as e:
                failures += 1
                _log.error("%s: does not start: %s", name, e)
        _log.warning("%s: up again after %.1f s", name, time.monotonic() - began_s)


def _threads_of(pid: int) -> _Threads:
    """As of one that sleeps where that is unknown.

    Sources: proc_pid_stat(5), and Documentation/scheduler/sched-stats.rst of Linux.
    """
    used_s, waited_s, wants = 0.0, {}, False
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            used, waited, _ = map(int, (task / "schedstat").read_text().split())
        except (OSError, ValueError, IndexError):  # it ended, or this system does not say
            continue
        used_s += used / _NANOSECONDS
        waited_s[task.name] = waited / _NANOSECONDS
        wants = wants or state in "RD"
    return _Threads(used_s, waited_s, wants)


def _die_with_parent() -> None:
    """Has Linux kill the child with the gateway, even where it hangs in a library."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
