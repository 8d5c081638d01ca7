"""A deployment: one artifact with its running engine and text stages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from core.errors import ConfigError
from serving.adapters import Adapter, resolve_all
from serving.artifact import Artifact
from serving.config import GenerationConfig, ServingConfig, Topology
from serving.engine import Engine, EngineInfo, TokenRequest
from serving.engines import selection
from serving.sampling import SamplingParams, defaults_of
from serving.text.codec import TextChunk
from serving.text.pipeline import LocalStages, TextStages
from serving.text.split import SplitStages
from serving.text.tokenizer import load


class Deployment:
    """An artifact with its running engine and text stages.

    Attributes:
        artifact: Artifact that is served.
        engine: Engine that generates tokens.
        text: Stages that turn text into tokens and back.
        adapters: Adapters that the engine has loaded, by name.
        defaults: Sampling settings where a request leaves them out.
        why: Name of the engine, and the reason it was picked.
    """

    def __init__(
        self,
        artifact: Artifact,
        engine: Engine,
        text: TextStages,
        adapters: dict[str, Adapter] | None = None,
        defaults: SamplingParams | None = None,
        why: str = "",
    ) -> None:
        self.artifact, self.engine, self.text, self.why = artifact, engine, text, why
        self.adapters, self.defaults = adapters or {}, defaults or SamplingParams()
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @classmethod
    async def start(cls, artifact: Artifact, config: ServingConfig, cache: Path) -> Deployment:
        """Starts engine and text stages; returns once the engine's scores were checked.

        Raises:
            SpotforgeError: The engine or a text stage does not start; nothing is left running.
        """
        adapters = await asyncio.to_thread(resolve_all, config.adapters, artifact)
        defaults = sampling_defaults(artifact.folder, config)
        starting = asyncio.create_task(selection.start(artifact, config.engine, cache, adapters))
        texts = asyncio.create_task(_start_text(artifact, config, cache))
        try:
            started, text = await asyncio.gather(starting, texts)
            check_defaults(defaults, started.info)
        except BaseException:
            # One failed, or this task was cancelled: the other one may be up already, or may come
            # up while it is cancelled, so both are awaited and whatever is up is closed.
            starting.cancel()
            texts.cancel()
            await asyncio.gather(starting, texts, return_exceptions=True)
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().engine.close()
            if not texts.cancelled() and texts.exception() is None:
                await texts.result().close()
            raise
        return cls(artifact, started.engine, text, adapters, defaults, started.why)

    @property
    def is_ready(self) -> bool:
        """True if engine and text stages would answer a request now."""
        return self.engine.is_ready and self.text.is_ready

    async def generate(
        self, request: TokenRequest, stop: Sequence[str], shown: Sequence[str] = ()
    ) -> AsyncIterator[TextChunk]:
        """Yields the text of one sequence, until it ends or meets a stop string.

        Args:
            request: Sequence that the engine generates.
            stop: Texts that end the sequence.
            shown: Special tokens that are part of the text.

        Raises:
            EngineRefused: The engine did not accept the request.
            EngineError: The request is lost.
        """
        decoder = self.text.decoder(stop, request.prompt, shown)
        chunks = self.engine.submit(request)
        try:
            async for chunk in chunks:
                text = await decoder.feed(chunk)
                yield text
                if text.finish_reason is not None:
                    return
        finally:
            # A client that goes away, or a stop string, ends the loop early: closing the iterator
            # cancels the sequence in the engine now, and not when it is garbage collected.
            decoder.close()
            await chunks.aclose()  # type: ignore[attr-defined]

    def __enter__(self) -> Deployment:
        """Keeps the deployment open while a request uses it."""
        self._users += 1
        self._unused.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if self._users == 0:
            self._unused.set()

    async def retire(self) -> None:
        """Closes the deployment when the last request that uses it has ended."""
        await self._unused.wait()
        await self.close()

    async def close(self) -> None:
        """Closes engine and text stages now; requests that still run are lost."""
        await self.engine.close()
        await self.text.close()


def sampling_defaults(folder: Path, config: ServingConfig) -> SamplingParams:
    """Returns the sampling settings that the model's author recommends, unless they are not wanted.

    Raises:
        ConfigError: The author's settings are not valid.
    """
    is_authors = config.generation_config is GenerationConfig.auto
    return defaults_of(folder) if is_authors else SamplingParams()


def check_defaults(defaults: SamplingParams, info: EngineInfo) -> None:
    """Raises ConfigError for a default that the engine does not support."""
    for name in defaults.extras():
        if name not in info.features:
            rule = f"the model says {name}={getattr(defaults, name)}, which {info.engine} lacks"
            fix = "set generation_config=vllm, or use another engine"
            raise ConfigError("generation_config", "auto", rule, fix)


async def _start_text(artifact: Artifact, config: ServingConfig, cache: Path) -> TextStages:
    files = await asyncio.to_thread(load, artifact, cache)
    if config.topology is Topology.local:
        return LocalStages(files)
    text = SplitStages(files, config.text.encoders or 1, config.text.decoders or 1)
    await text.start()
    return text
