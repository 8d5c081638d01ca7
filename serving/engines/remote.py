"""An engine that is a remote server: it is probed, and requests that it lost are repeated."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from core.errors import ConfigError, SpotforgeError
from serving.config import EngineConfig
from serving.engine import (
    EngineError,
    EngineInfo,
    EngineStats,
    Prove,
    TokenChunk,
    TokenRequest,
)
from serving.engines.completions import CompletionsClient, Lost, http_client
from serving.engines.process import Watch, watch_of

_log = logging.getLogger("spotforge.serving")
_VLLM_FEATURES = [
    "json_schema",
    "logprobs_when_sampling",
    "top_k",
    "min_p",
    "repetition_penalty",
]
_LOSSES_OF_A_REQUEST = 2
_PATIENCE_S = 5.0  # enough for a load balancer to switch to another server
_RETRY_PROBE_S = 1.0
_LOOK_TIMEOUT_S = 2.0  # for the server's metrics, which need no forward of the model


class RemoteEngine:
    """An `Engine` behind OpenAI's API.

    Once the server generates tokens again, a request that it lost is repeated with the tokens that
    had arrived, provided that their ids are known or none had arrived. A request with a schema is
    not repeated after its first token, since its grammar would start over in the middle of a text.

    Args:
        client: Client of the server.
        max_context: Tokens of prompt and answer together, if the server gives no limit.
        limits_context: True: `max_context` is a setting, and a server with less is refused.
        max_running: Sequences that are sent to the server at once.
        watch: Limits beyond which the server counts as lost.
        patience_s: Seconds that a lost request waits for the server.
    """

    def __init__(
        self,
        client: CompletionsClient,
        *,
        max_context: int,
        limits_context: bool,
        max_running: int,
        watch: Watch,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._client, self._watch, self._patience_s = client, watch, patience_s
        self._max_context, self._limits_context = max_context, limits_context
        self._max_running = max_running
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._is_ready = self._is_closed = False
        self._up = asyncio.Event()  # set while a token has come since the last doubt
        self._doubted = asyncio.Event()
        self._token_s = 0.0
        self._watching: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        """See `Engine`."""
        assert self._info is not None, "start it first"
        return self._info

    @property
    def is_ready(self) -> bool:
        """See `Engine`."""
        return self._is_ready and not self._is_closed

    async def start(self, prove: Prove | None = None) -> EngineInfo:
        """See `Engine`. The scores of a remote server are not checked."""
        try:
            async with asyncio.timeout(self._watch.probe_timeout_s):
                server = await self._client.connect()
        except TimeoutError as e:
            timeout_s = self._watch.probe_timeout_s
            raise SpotforgeError(f"engine: generated no token within {timeout_s:g} s") from e
        except EngineError as e:
            raise SpotforgeError(f"engine: {e}") from e
        max_context = self._max_context
        if server.max_context is not None:
            if self._limits_context and server.max_context < max_context:
                rule = f"the server's context has {server.max_context} tokens"
                raise ConfigError("engine.max_context", max_context, rule, "give less")
            max_context = min(max_context, server.max_context)
        # By default vLLM returns `raw_logprobs`, which are the model's own.
        features = _VLLM_FEATURES if server.tells_ids else []
        max_logprobs = 20 if server.tells_ids else -1
        self._info = EngineInfo(server.name, max_context, self._max_running, max_logprobs, features)
        self._token_s = time.monotonic()
        self._is_ready = True
        self._up.set()
        self._watching = asyncio.create_task(self._probe_on_and_on())
        return self._info

    async def submit(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        """See `Engine`."""
        stats = self._stats
        stats.running += 1
        stats.prompt_tokens += len(request.prompt)
        tokens: list[int] = []
        has_begun, losses = False, 0
        try:
            while True:
                try:
                    chunks = self._client.stream(request.rest(tokens))
                    async with contextlib.aclosing(chunks):  # type: ignore[type-var]
                        async for chunk in chunks:
                            self._token_s = time.monotonic()
                            has_begun = True
                            tokens += chunk.tokens
                            stats.generation_tokens += chunk.num_tokens
                            yield chunk
                    return
                except Lost as e:
                    losses += 1
                    self.doubt()
                    # Text without ids cannot be appended to the prompt, and a grammar would begin
                    # again in the middle of its text.
                    may_go_on = self._client.server.tells_ids and request.schema is None
                    if losses == _LOSSES_OF_A_REQUEST or (has_begun and not may_go_on):
                        raise
                    await self._until_up(e)
                # All tokens had come, but not the end of the stream.
                if len(tokens) == request.max_tokens:
                    yield TokenChunk([], None, "length")
                    return
        finally:
            stats.running -= 1

    async def embed(
        self, id: str, inputs: list[list[int]], adapter: str | None = None
    ) -> list[list[float]]:
        """See `Engine`."""
        raise EngineError(f"{self.info.engine} has no embeddings here")

    def stats(self) -> EngineStats:
        """See `Engine`."""
        return self._stats

    async def close(self) -> None:
        """See `Engine`. The remote server itself goes on."""
        self._is_closed = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._up.set()  # wakes requests that wait in `_until_up`, which see `_is_closed`
        await self._client.close()

    def doubt(self) -> None:
        """Has the server probed at once, since it may be lost."""
        self._up.clear()
        self._doubted.set()

    async def _until_up(self, why: EngineError) -> None:
        """Waits until the server generates tokens; raises `why` if it does not in time."""
        if not self._is_closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience_s):
                    await self._up.wait()
        if self._is_closed or not self._up.is_set():
            raise why

    async def _probe_on_and_on(self) -> None:
        interval_s = self._watch.probe_interval_s
        while True:
            if self._is_ready:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(interval_s):
                        await self._doubted.wait()
            else:
                await asyncio.sleep(min(interval_s, _RETRY_PROBE_S))
            # Tokens of requests count as probes: a busy server gets no additional ones.
            is_fresh = time.monotonic() - self._token_s < interval_s
            if self._doubted.is_set() or not self._is_ready or not is_fresh:
                self._doubted.clear()
                await self._probe()
            if self._is_ready:
                await self._look()

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT_S):
                self._stats.kv_cache_usage = await self._client.kv_cache_usage()
        except TimeoutError:
            self.doubt()

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(self._watch.probe_timeout_s):
                await self._client.probe()
        except (EngineError, TimeoutError) as e:
            if self._is_ready:
                why = str(e) or f"within {self._watch.probe_timeout_s:g} s"
                _log.error("engine: generates no token: %s", why)
            self._is_ready = False
            self._up.clear()
        else:
            if not self._is_ready:
                _log.warning("engine: generates tokens again")
            self._token_s = time.monotonic()
            self._is_ready = True
            self._up.set()


def connect(config: EngineConfig, max_context: int) -> RemoteEngine:
    """Returns the engine for the server at `engine.url`, not started yet.

    Args:
        config: Settings of the engine.
        max_context: Tokens of the context by the settings or the model.

    Raises:
        ConfigError: The URL is not valid, or the API key is not in the environment.
    """
    url = (config.url or "").rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("engine.url", config.url, "is not a URL", "give http://HOST:PORT")
    api_key = None
    if config.api_key_env is not None and not (api_key := os.environ.get(config.api_key_env)):
        rule = "is not in the environment"
        raise ConfigError("engine.api_key_env", config.api_key_env, rule, "export it")
    return RemoteEngine(
        CompletionsClient(http_client(url, config.step_timeout_s, api_key), config.remote_model),
        max_context=max_context,
        limits_context=config.max_context is not None,
        max_running=config.max_running,
        watch=watch_of(config),
    )
