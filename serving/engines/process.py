"""An engine that is a child process: started, watched, killed when it hangs, and started again.

A request outlives its process: the next process gets the prompt with the tokens that were generated
so far, and goes on. A request that was in the engine at two deaths is given up, since it may be
what kills the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import ConfigError, SpotforgeError
from core.process.json_child import ChildEnded, JsonChild
from core.process.keep_up import keep_up
from core.process.liveness import LOOK_S
from core.process.python import environment
from serving.config import EngineConfig
from serving.engine import (
    EngineError,
    EngineFailed,
    EngineInfo,
    EngineRefused,
    EngineStats,
    Prove,
    Tie,
    TokenChunk,
    TokenLogprob,
    TokenRequest,
    Unproven,
)

_log = logging.getLogger("spotforge.serving")
# One death may have been another request's fault; at the second, this one is suspected itself.
_DEATHS_OF_A_REQUEST = 2
_PROBE = "probe-"
_NO_NUMBERS = "its log-probabilities are NaN or infinite: check the model's weights"


@dataclass(frozen=True)
class Watch:
    """Limits beyond which an engine counts as hung, all in seconds.

    Attributes:
        start_timeout_s: Time for loading, the first token, and the check of the scores.
        silence_s: Time without a line, without using CPU time and without waiting for a CPU.
        step_timeout_s: Time without a line, even if the engine is busy.
        probe_interval_s: Time without a token after which one is asked for as a probe.
        probe_timeout_s: Time for the probe's token, counted while the engine has a CPU.
    """

    start_timeout_s: float = 600.0
    silence_s: float = 3.0
    step_timeout_s: float = 120.0
    probe_interval_s: float = 10.0
    probe_timeout_s: float = 30.0


def watch_of(config: EngineConfig) -> Watch:
    """Returns the limits that the settings give."""
    return Watch(
        start_timeout_s=config.start_timeout_s,
        silence_s=config.silence_s,
        step_timeout_s=config.step_timeout_s,
        probe_interval_s=config.probe_interval_s,
    )


@dataclass(eq=False)
class _Live:
    """A request that is not finished.

    Attributes:
        request: Request as it was submitted.
        chunks: Chunks that the consumer has not taken yet.
        tokens: Tokens that were generated so far.
        deaths: Number of processes that died while they had the request.
    """

    request: TokenRequest
    chunks: asyncio.Queue[TokenChunk | EngineError] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)
    deaths: int = 0


@dataclass(eq=False)
class _Embeds:
    """Inputs that are being embedded.

    Attributes:
        count: Number of inputs.
        all: Future that resolves to the vectors of all inputs.
        vectors: Vectors that have arrived, in the order of the inputs.
    """

    count: int
    all: asyncio.Future[list[list[float]]]
    vectors: list[list[float]] = field(default_factory=list)

    def add(self, vector: list[float]) -> None:
        """Adds the vector of the next input."""
        self.vectors.append(vector)
        if len(self.vectors) == self.count and not self.all.done():
            self.all.set_result(self.vectors)


class ProcessEngine:
    """An `Engine` in a child process.

    Args:
        command: Command line of the engine program.
        watch: Limits beyond which the program counts as hung.
        env: Variables that are added to its environment.
    """

    def __init__(
        self, command: Sequence[str], watch: Watch | None = None, env: dict[str, str] | None = None
    ) -> None:
        self._command, self._watch = list(command), watch or Watch()
        self._env = environment(**(env or {}))
        self._child: JsonChild | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._live: dict[str, _Live] = {}
        self._embeds: dict[str, _Embeds] = {}
        self._scores: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._is_up = False  # the process runs, has reported that it is ready, and made a token
        self._is_hung = False
        self._misconfigured: ConfigError | None = None
        self._unfit: Unproven | None = None
        self._token_s = 0.0  # time of the last token, by the monotonic clock
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
        """Id of the process that runs now; None: there is no process."""
        return None if self._child is None else self._child.pid

    async def start(self, prove: Prove | None = None) -> EngineInfo:
        """See `Engine`."""
        timeout_s = self._watch.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._launch()
                # Not supervised yet: an engine that dies during the check has failed it.
                if prove is not None:
                    assert self._child is not None
                    await self._child.unless_it_ends(prove(self))
        except TimeoutError as e:
            await self._kill()
            rule = f"it was not loaded and checked within {timeout_s:g} s"
            raise SpotforgeError(f"engine: {rule}; increase engine.start_timeout_s") from e
        except BaseException as e:
            await self._kill()
            # An error after "ready" concerns how the engine runs this model: another engine may
            # be tried. An error before it concerns the start.
            is_about_the_model = isinstance(e, EngineError) or (
                isinstance(e, ChildEnded) and self._ready is not None and self._ready.done()
            )
            raise (Unproven(str(e)) if is_about_the_model else e) from None
        # The program frees its second model now, before requests need the memory.
        self._say("proven", None)
        work = keep_up("engine", _log, self._watch_one, self._end, self._launch_again)
        self._tasks.append(asyncio.create_task(work))
        return self.info

    async def submit(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        """See `Engine`."""
        live = _Live(request)
        self._live[request.id] = live
        self._stats.prompt_tokens += len(request.prompt)
        try:
            if self._up.is_set():
                self._say("submit", dataclasses.asdict(request))
            # Otherwise `_launch` submits it when the next process is up.
            while True:
                chunk = await live.chunks.get()
                if isinstance(chunk, EngineError):
                    raise chunk
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            # Still in `_live` means not finished: the consumer has stopped early.
            if self._live.pop(request.id, None) is not None:
                self._say("cancel", request.id)

    async def embed(
        self, id: str, inputs: list[list[int]], adapter: str | None = None
    ) -> list[list[float]]:
        """See `Engine`."""
        if "embeddings" not in self.info.features:
            raise EngineError(f"{self.info.engine} has no embeddings")
        if not self._up.is_set():
            raise EngineError("the engine is being started again")
        embeds = self._embeds[id] = _Embeds(len(inputs), asyncio.get_running_loop().create_future())
        try:
            self._say("embed", {"id": id, "inputs": inputs, "adapter": adapter})
            return await embeds.all
        finally:
            del self._embeds[id]
            if len(embeds.vectors) < embeds.count:
                self._say("cancel", id)

    async def score(
        self,
        id: str,
        tokens: list[int],
        start: int,
        of: list[list[int]],
        adapter: str | None,
        turned: Sequence[Tie] = (),
    ) -> tuple[list[list[float]], tuple[Tie, ...]]:
        """Has the program compute log-probabilities by a plain forward of its own weights.

        Args:
            id: Id that is unique among the engine's requests.
            tokens: Token ids of a whole sequence.
            start: Index of the first token that is scored.
            of: Token ids whose log-probabilities are wanted, for each position from `start` on.
            adapter: Name of the adapter that is added to the model; None: the model alone.
            turned: Ties that are decided the other way.

        Returns:
            For each position from `start` on, the log-probabilities of the likeliest token and of
            those in `of`; and the ties that were found.

        Raises:
            EngineError: The program could not compute them.
        """
        scored: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._scores[id] = scored
        try:
            asked = {"id": id, "tokens": tokens, "start": start, "of": of, "adapter": adapter}
            self._say("score", asked | {"turned": list(turned)})
            told = await scored
            return told["scores"], tuple((call, row) for call, row in told["ties"])
        finally:
            del self._scores[id]

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
        """Starts a process, waits until it is ready, and has it generate one token."""
        self._misconfigured, self._unfit, self._is_hung = None, None, False
        self._ready = asyncio.get_running_loop().create_future()
        self._child = await JsonChild.start(self._command, self._hear, self._env)
        try:
            async with asyncio.timeout(self._watch.start_timeout_s):
                self._info = await self._child.unless_it_ends(self._ready)
                await self._probe()
        except TimeoutError as e:
            await self._kill()
            timeout_s = self._watch.start_timeout_s
            raise SpotforgeError(f"engine: generated no token within {timeout_s:g} s") from e
        except ChildEnded as e:
            await self._kill()
            # The program's own explanation, if it sent one, says more than its exit code.
            raise self._misconfigured or self._unfit or e from None
        except BaseException:
            await self._kill()
            raise
        # No `await` between the event and the loop: a request is submitted either here or by
        # `submit`, never by both.
        self._is_up = True
        self._up.set()
        for live in self._live.values():
            self._say("submit", dataclasses.asdict(live.request.rest(live.tokens)))

    async def _probe(self) -> None:
        """Has the process generate one token with its log-probability."""
        assert self._child is not None
        # With its log-probability, so that weights that are NaN show before the engine is ready.
        name = f"{_PROBE}{next(self._probes)}"
        request = TokenRequest(name, [0], 1, temperature=0, ignore_eos=True, logprobs=0)
        live = self._live[name] = _Live(request)
        try:
            self._say("submit", dataclasses.asdict(live.request))
            while True:
                chunk = await self._child.unless_it_ends(live.chunks.get())
                if isinstance(chunk, EngineError):
                    raise chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._live.pop(name, None)

    def _say(self, kind: str, content: Any) -> None:
        if self._child is not None:
            self._child.say(kind, content)

    def _hear(self, kind: str, content: Any) -> None:
        if kind == "step":
            self._on_step(content)
        elif kind == "ready":
            assert self._ready is not None
            self._ready.set_result(EngineInfo(**content))
        elif kind == "failed":
            self._on_failed(content["id"], EngineFailed(content["error"]))
        elif kind == "refused":
            self._on_failed(content["id"], EngineRefused(content["error"]))
        elif kind == "embedding":
            if (embeds := self._embeds.get(content["id"])) is not None:
                embeds.add(content["vector"])
        elif kind == "scored":
            if (scored := self._scores.get(content["id"])) is not None and not scored.done():
                scored.set_result(content)
        elif kind == "idle":
            self._stats.running = 0
            self._stats.kv_cache_usage = content["kv_cache_usage"]
        elif kind == "misconfigured":
            self._misconfigured = ConfigError(*content)
        elif kind == "unfit":
            self._unfit = Unproven(content)

    def _on_step(self, step: dict[str, Any]) -> None:
        self._token_s = time.monotonic()
        self._stats.running = step["running"]
        self._stats.kv_cache_usage = step["kv_cache_usage"]
        finished = dict(step["finished"])
        for name, tokens, logprobs in step["tokens"]:
            live = self._live.get(name)
            if live is None:
                continue  # cancelled in the meantime
            live.tokens += tokens
            self._stats.generation_tokens += len(tokens)
            if logprobs is not None:
                # JSON cannot carry NaN to the client, and tokens of such a model are arbitrary.
                if not all(math.isfinite(own) for own, _ in logprobs):
                    self._say("cancel", name)
                    self._on_failed(name, EngineFailed(_NO_NUMBERS))
                    continue
                logprobs = [TokenLogprob(own, [tuple(t) for t in top]) for own, top in logprobs]
            reason = finished.pop(name, None)
            if reason is not None:
                del self._live[name]
            live.chunks.put_nowait(TokenChunk(tokens, logprobs, reason))
        # The protocol also allows an end without an entry in `tokens`.
        for name, reason in finished.items():
            if (live := self._live.pop(name, None)) is not None:
                live.chunks.put_nowait(TokenChunk([], None, reason))

    def _on_failed(self, name: str, error: EngineError) -> None:
        if (live := self._live.pop(name, None)) is not None:
            live.chunks.put_nowait(error)
        elif (embeds := self._embeds.get(name)) is not None and not embeds.all.done():
            embeds.all.set_exception(error)
        elif (scored := self._scores.get(name)) is not None and not scored.done():
            scored.set_exception(error)

    # -- Watching ----------------------------------------------------------------------------

    async def _end(self, why: str) -> None:
        await self._kill()
        self._count_deaths(why)

    async def _launch_again(self) -> None:
        self._stats.restarts += 1
        await self._launch()

    async def _watch_one(self) -> str:
        """Watches the process until it must be replaced; returns why."""
        watch, child = self._watch, self._child
        assert child is not None
        probing: asyncio.Task[None] | None = None
        probe_s = 0.0  # time that the child had for the probe, without waits for a CPU
        try:
            while True:
                if await child.ends_within(LOOK_S):
                    return await child.last_words()
                # Silence alone is not a hang: a long step, or a busy host, is silent too.
                look = child.look()
                self._is_hung = look.still_s > watch.silence_s
                if self._is_hung:
                    return f"sent nothing and did nothing for {look.still_s:.1f} s"
                if look.silent_s > watch.step_timeout_s:
                    return f"sent nothing for {look.silent_s:.0f} s"
                probe_s += look.had_s
                if probing is not None and probing.done():
                    if (error := probing.exception()) is not None:
                        return f"generates no token: {error}"
                    probing = None
                if probing is None and time.monotonic() - self._token_s > watch.probe_interval_s:
                    probing, probe_s = asyncio.create_task(self._probe()), 0.0
                if probing is not None and probe_s > watch.probe_timeout_s:
                    return f"generated no token within {watch.probe_timeout_s:g} s"
        finally:
            if probing is not None:
                probing.cancel()

    def _count_deaths(self, why: str) -> None:
        # Embeddings are not handed over: the client repeats the request.
        for name, embeds in self._embeds.items():
            if not embeds.all.done():
                embeds.all.set_exception(EngineError(f"{name} was lost when its engine ended"))
        for live in list(self._live.values()):
            live.deaths += 1
            if live.deaths >= _DEATHS_OF_A_REQUEST or live.request.id.startswith(_PROBE):
                del self._live[live.request.id]
                live.chunks.put_nowait(EngineFailed(f"the engine failed twice with it: {why}"))
            # All tokens had come but not the line that says so: there is nothing left to ask for.
            elif len(live.tokens) >= live.request.max_tokens:
                del self._live[live.request.id]
                live.chunks.put_nowait(TokenChunk([], None, "length"))

    def _fail_all(self, why: str) -> None:
        for live in self._live.values():
            live.chunks.put_nowait(EngineError(why))
        self._live.clear()

    async def _kill(self) -> None:
        """Kills the process; the next one takes over its requests, or they are lost."""
        self._is_up = False
        self._up.clear()
        child, self._child = self._child, None
        if child is not None:
            await child.kill()
