"""An engine that is a child process: started, watched, killed when it hangs, and started again.

A request outlives the process that was working on it: the next one gets its prompt with the tokens
that were generated before, and goes on. Only what was in the engine at two deaths is given up, as
it may be what kills it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from monitoring.errors import SpotforgeError
from serving.engine import (
    EngineError,
    EngineInfo,
    EngineStats,
    TokenChunk,
    TokenLogprob,
    TokenRequest,
)

T = TypeVar("T")

_log = logging.getLogger("spotforge.serving")
_LINE_BYTES = 1 << 26  # embeddings are the longest lines
_DEATHS_OF_A_REQUEST = 2
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_PROBE = "probe-"
_BACKOFF_S = (0.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # by failures in a row
_STABLE_S = 60.0  # an engine that lived this long has not failed in a row


@dataclass(frozen=True)
class Watch:
    """When an engine counts as hung.

    Attributes:
        start_timeout_s: For loading, and one token.
        silence_s: Without a line *and* without using any CPU time.
        step_timeout_s: Without a line, however busy it is.
        probe_interval_s: A token is asked for when none was made for this long.
        probe_timeout_s: For that token, in an engine that has nothing else to do.
    """

    start_timeout_s: float = 600.0
    silence_s: float = 3.0
    step_timeout_s: float = 120.0
    probe_interval_s: float = 10.0
    probe_timeout_s: float = 30.0


@dataclass(eq=False)
class _Live:
    """A request that is not finished.

    Attributes:
        request: As it was first asked for.
        chunks: What the consumer has not taken yet.
        tokens: Generated so far.
        deaths: Of processes that had it.
    """

    request: TokenRequest
    chunks: asyncio.Queue[TokenChunk | EngineError] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)
    deaths: int = 0

    def rest(self) -> TokenRequest:
        """What is still to be generated."""
        return dataclasses.replace(
            self.request,
            prompt=self.request.prompt + self.tokens,
            max_tokens=self.request.max_tokens - len(self.tokens),
            offset=len(self.tokens),
        )


class ProcessEngine:
    """An `Engine` in a process of its own.

    Args:
        command: Of the engine program.
        watch: When it counts as hung.
        env: More of its environment.
    """

    def __init__(
        self, command: Sequence[str], watch: Watch | None = None, env: dict[str, str] | None = None
    ) -> None:
        self._command, self._watch = list(command), watch or Watch()
        self._env = os.environ | (env or {})
        self._process: asyncio.subprocess.Process | None = None
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._live: dict[str, _Live] = {}
        self._embeds: dict[str, asyncio.Future[list[list[float]]]] = {}
        self._is_up = False  # a process is there, has said that it is ready, and made a token
        self._is_hung = False
        self._heard_s = self._token_s = 0.0  # when there was a line, a token
        self._said: deque[str] = deque(maxlen=20)  # the last lines of standard error
        self._fatal: str | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._up = asyncio.Event()
        self._probes = itertools.count()

    # -- What the gateway calls --------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """See `Engine`."""
        assert self._info is not None, "start it first"
        return self._info

    @property
    def is_ready(self) -> bool:
        """See `Engine`."""
        return self._is_up and not self._is_hung

    @property
    def pid(self) -> int | None:
        """Of the process that is there now."""
        return None if self._process is None else self._process.pid

    async def start(self) -> EngineInfo:
        """See `Engine`."""
        try:
            await self._launch()
        except BaseException:
            await self._kill()
            raise
        self._tasks.append(asyncio.create_task(self._supervise()))
        return self.info

    async def submit(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        """See `Engine`."""
        live = _Live(request)
        self._live[request.id] = live
        self._stats.prompt_tokens += len(request.prompt)
        try:
            if self._up.is_set():
                self._say({"submit": dataclasses.asdict(request)})
            # Otherwise it is handed over when the next process is up.
            while True:
                chunk = await live.chunks.get()
                if isinstance(chunk, EngineError):
                    raise chunk
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            if self._live.pop(request.id, None) is not None:
                self._say({"cancel": request.id})

    async def embed(self, id: str, inputs: list[list[int]]) -> list[list[float]]:
        """See `Engine`."""
        if "embeddings" not in self.info.features:
            raise EngineError(f"{self.info.engine} makes no embeddings")
        if not self._up.is_set():
            raise EngineError("the engine is being started again")
        future = asyncio.get_running_loop().create_future()
        self._embeds[id] = future
        try:
            self._say({"embed": {"id": id, "inputs": inputs}})
            vectors: list[list[float]] = await future
            return vectors
        finally:
            del self._embeds[id]

    def stats(self) -> EngineStats:
        """See `Engine`."""
        return self._stats

    async def close(self) -> None:
        """See `Engine`."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._kill()
        self._fail_all("the engine was stopped")

    # -- One process -------------------------------------------------------------------------

    async def _launch(self) -> None:
        """Starts a process, waits until it is ready, and has it make one token."""
        self._fatal, self._is_hung = None, False
        self._said.clear()
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
            env=self._env,
            preexec_fn=_die_with_parent,
        )
        ready: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(self._process, ready))
        self._errors = asyncio.create_task(self._read_errors(self._process))
        try:
            async with asyncio.timeout(self._watch.start_timeout_s):
                self._info = await self._unless_it_ends(ready)
                await self._probe()
        except TimeoutError as e:
            timeout_s = self._watch.start_timeout_s
            raise SpotforgeError(f"engine: made no token within {timeout_s:g} s") from e
        self._is_up = True
        self._up.set()
        for live in self._live.values():
            self._say({"submit": dataclasses.asdict(live.rest())})

    async def _probe(self) -> None:
        """One token, of the process that is there."""
        name = f"{_PROBE}{next(self._probes)}"
        live = self._live[name] = _Live(TokenRequest(name, [0], 1, temperature=0, ignore_eos=True))
        try:
            self._say({"submit": dataclasses.asdict(live.request)})
            while True:
                chunk = await self._unless_it_ends(asyncio.ensure_future(live.chunks.get()))
                if isinstance(chunk, EngineError):
                    raise chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._live.pop(name, None)

    async def _unless_it_ends(self, future: asyncio.Future[T]) -> T:
        """A future's result; raises EngineError when the process ends before."""
        waits: list[asyncio.Future[Any]] = [future, self._reader]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                await self._errors
                raise EngineError(self._last_words())
            return future.result()
        finally:
            future.cancel()

    def _say(self, message: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None or process.stdin.is_closing():
            return
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def _read(
        self, process: asyncio.subprocess.Process, ready: asyncio.Future[EngineInfo]
    ) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self._heard_s = time.monotonic()
            for kind, content in json.loads(line).items():
                if kind == "step":
                    self._on_step(content)
                elif kind == "ready":
                    ready.set_result(EngineInfo(**content))
                elif kind == "failed":
                    self._on_failed(content["id"], content["error"])
                elif kind == "embeddings":
                    if (future := self._embeds.get(content["id"])) and not future.done():
                        future.set_result(content["vectors"])
                elif kind == "idle":
                    self._stats.running = 0
                    self._stats.kv_cache_usage = content["kv_cache_usage"]
                elif kind == "fatal":
                    self._fatal = content

    async def _read_errors(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while line := await process.stderr.readline():
            self._said.append(line.decode(errors="replace").rstrip())

    def _on_step(self, step: dict[str, Any]) -> None:
        self._token_s = self._heard_s
        self._stats.running = step["running"]
        self._stats.kv_cache_usage = step["kv_cache_usage"]
        finished = dict(step["finished"])
        for name, tokens, logprobs in step["tokens"]:
            live = self._live.get(name)
            if live is None:
                continue  # cancelled since
            live.tokens += tokens
            self._stats.generation_tokens += len(tokens)
            if logprobs is not None:
                logprobs = [TokenLogprob(own, [tuple(t) for t in top]) for own, top in logprobs]
            reason = finished.pop(name, None)
            if reason is not None:
                del self._live[name]
            live.chunks.put_nowait(TokenChunk(tokens, logprobs, reason))
        for name, reason in finished.items():
            if (live := self._live.pop(name, None)) is not None:
                live.chunks.put_nowait(TokenChunk([], None, reason))

    def _on_failed(self, name: str, error: str) -> None:
        if (live := self._live.pop(name, None)) is not None:
            live.chunks.put_nowait(EngineError(error))
        elif (future := self._embeds.get(name)) is not None and not future.done():
            future.set_exception(EngineError(error))

    def _last_words(self) -> str:
        code = None if self._process is None else self._process.returncode
        said = self._fatal or next((line for line in reversed(self._said) if line), None)
        ended = (
            f"killed by signal {-code}" if code is not None and code < 0 else f"ended with {code}"
        )
        return f"{ended}: {said}" if said else f"{ended}, and said nothing"

    # -- Watching ----------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Starts the engine again whenever it died or hung."""
        failures = 0  # in a row
        while True:
            began_s = time.monotonic()
            why = await self._watch_one()
            await self._kill()
            _log.warning("engine: %s; it is started again", why)
            self._count_deaths(why)
            failures = 0 if time.monotonic() - began_s > _STABLE_S else failures + 1
            await self._start_again(failures)

    async def _start_again(self, failures: int) -> None:
        """Until it is up, in longer and longer intervals."""
        while True:
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            self._stats.restarts += 1
            began_s = time.monotonic()
            try:
                await self._launch()
            except SpotforgeError as e:
                failures += 1
                _log.error("engine: does not start: %s", e)
                await self._kill()
            else:
                _log.warning("engine: up again after %.1f s", time.monotonic() - began_s)
                return

    async def _watch_one(self) -> str:
        """Returns why the process that is there is not to be kept."""
        watch, process = self._watch, self._process
        assert process is not None
        cpu_s, cpu_changed_s = _cpu_seconds(process.pid), time.monotonic()
        probing: asyncio.Task[None] | None = None
        probe_began_s = 0.0
        try:
            while True:
                await asyncio.wait([self._reader], timeout=0.25)
                now_s = time.monotonic()
                if self._reader.done():
                    await process.wait()
                    await self._errors
                    return self._last_words()
                if (used_s := _cpu_seconds(process.pid)) != cpu_s:
                    cpu_s, cpu_changed_s = used_s, now_s
                silent_s = now_s - self._heard_s
                still_s = min(silent_s, now_s - cpu_changed_s)
                self._is_hung = still_s > watch.silence_s
                if self._is_hung:
                    return f"said nothing and did nothing for {still_s:.1f} s"
                if silent_s > watch.step_timeout_s:
                    return f"said nothing for {silent_s:.0f} s"
                if probing is not None and probing.done():
                    if (error := probing.exception()) is not None:
                        return f"makes no token: {error}"
                    probing = None
                if probing is None and now_s - self._token_s > watch.probe_interval_s:
                    probing, probe_began_s = asyncio.create_task(self._probe()), now_s
                if probing is not None and now_s - probe_began_s > watch.probe_timeout_s:
                    return f"made no token within {watch.probe_timeout_s:g} s"
        finally:
            if probing is not None:
                probing.cancel()

    def _count_deaths(self, why: str) -> None:
        for name, future in self._embeds.items():
            if not future.done():
                future.set_exception(EngineError(f"lost with its engine ({name})"))
        for live in list(self._live.values()):
            live.deaths += 1
            if live.deaths >= _DEATHS_OF_A_REQUEST or live.request.id.startswith(_PROBE):
                del self._live[live.request.id]
                live.chunks.put_nowait(EngineError(f"the engine failed twice with it: {why}"))
            elif len(live.tokens) >= live.request.max_tokens:
                del self._live[live.request.id]
                live.chunks.put_nowait(TokenChunk([], None, "length"))

    def _fail_all(self, why: str) -> None:
        for live in self._live.values():
            live.chunks.put_nowait(EngineError(why))
        self._live.clear()

    async def _kill(self) -> None:
        """Ends the process, at once: what it held is handed to the next, or lost."""
        self._is_up = False
        self._up.clear()
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
        await asyncio.gather(self._reader, self._errors, return_exceptions=True)


def _cpu_seconds(pid: int) -> float | None:
    """User and system time of a process; None where that is not known, or it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _die_with_parent() -> None:
    """Has Linux kill the engine with the gateway, even where it hangs in a library."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
