"""One artifact that is up: its engine and its text stages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from core.errors import ConfigError
from serving.adapters import Adapter, resolve_all
from serving.artifact import Artifact
from serving.config import GenerationConfig, ServingConfig, Topology
from serving.engine import Engine, EngineInfo, TokenRequest
from serving.engines import choose
from serving.sampling import Choice, defaults_of
from serving.text.pipeline import LocalStages, TextStages
from serving.text.split import SplitStages
from serving.text.stages import TextChunk
from serving.text.tokenizer import load


class Deployment:
    """An artifact with all that answers for it.

    Attributes:
        artifact: What is served.
        engine: What generates.
        text: The stages around it.
        adapters: That the engine has, by name.
        defaults: How tokens are chosen where a request does not say.
        why: Which engine it is, and for what reason.
    """

    def __init__(
        self,
        artifact: Artifact,
        engine: Engine,
        text: TextStages,
        adapters: dict[str, Adapter] | None = None,
        defaults: Choice | None = None,
        why: str = "",
    ) -> None:
        self.artifact, self.engine, self.text, self.why = artifact, engine, text, why
        self.adapters, self.defaults = adapters or {}, defaults or Choice()
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @classmethod
    async def start(cls, artifact: Artifact, config: ServingConfig, cache: Path) -> Deployment:
        """Starts all of it; returns once the engine has proven that it computes what it should.

        Raises:
            SpotforgeError: It does not start; nothing is left running.
        """
        adapters = await asyncio.to_thread(resolve_all, config.adapters, artifact)
        defaults = sampling_defaults(artifact.folder, config)
        starting = asyncio.create_task(choose.start(artifact, config.engine, cache, adapters))
        texts = asyncio.create_task(_start_text(artifact, config, cache))
        try:
            started, text = await asyncio.gather(starting, texts)
            check_defaults(defaults, started.info)
        except BaseException:
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
        """Whether it would answer a request now."""
        return self.engine.is_ready and self.text.is_ready

    async def generate(
        self, request: TokenRequest, stop: Sequence[str], shown: Sequence[str] = ()
    ) -> AsyncIterator[TextChunk]:
        """The text of one sequence, until it ends or meets a stop string.

        Args:
            request: For the engine.
            stop: Texts that end it.
            shown: Special tokens that are part of its text.

        Raises:
            EngineRefused: The engine did not take it.
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
            decoder.close()
            await chunks.aclose()  # type: ignore[attr-defined]

    def __enter__(self) -> Deployment:
        """Used by a request: it is not closed before that ends."""
        self._users += 1
        self._unused.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if self._users == 0:
            self._unused.set()

    async def retire(self) -> None:
        """Closes it when the last request that uses it has ended."""
        await self._unused.wait()
        await self.close()

    async def close(self) -> None:
        """Now; what it still works on is lost."""
        await self.engine.close()
        await self.text.close()


def sampling_defaults(folder: Path, config: ServingConfig) -> Choice:
    """As the model's author has them, if that is asked for; raises ConfigError: they cannot be."""
    is_authors = config.generation_config is GenerationConfig.auto
    return defaults_of(folder) if is_authors else Choice()


def check_defaults(defaults: Choice, info: EngineInfo) -> None:
    """Raises ConfigError for one that an engine has not."""
    for name in defaults.extras():
        if name not in info.features:
            rule = f"the model says {name}={getattr(defaults, name)}, and {info.engine} has none"
            fix = "set generation_config=vllm, or take another engine"
            raise ConfigError("generation_config", "auto", rule, fix)


async def _start_text(artifact: Artifact, config: ServingConfig, cache: Path) -> TextStages:
    files = await asyncio.to_thread(load, artifact, cache)
    if config.topology is Topology.local:
        return LocalStages(files)
    text = SplitStages(files, config.text.encoders or 1, config.text.decoders or 1)
    await text.start()
    return text
