"""One artifact that is up: its engine and its text stages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from serving.artifact import Artifact
from serving.config import ServingConfig
from serving.engine import Engine, TokenRequest
from serving.engines.choose import build
from serving.text.pipeline import LocalStages, TextStages
from serving.text.stages import TextChunk
from serving.text.tokenizer import load

_log = logging.getLogger("spotforge.serving")


class Deployment:
    """An artifact with all that answers for it.

    Attributes:
        artifact: What is served.
        engine: What generates.
        text: The stages around it.
    """

    def __init__(self, artifact: Artifact, engine: Engine, text: TextStages) -> None:
        self.artifact, self.engine, self.text = artifact, engine, text
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @classmethod
    async def start(cls, artifact: Artifact, config: ServingConfig, cache: Path) -> Deployment:
        """Starts all of it; returns once the engine has made a token.

        Raises:
            SpotforgeError: It does not start; nothing is left running.
        """
        engine, why = await build(artifact, config.engine, cache)
        tokenizer = asyncio.create_task(asyncio.to_thread(load, artifact, cache))
        starting = asyncio.create_task(engine.start())
        try:
            files, info = await asyncio.gather(tokenizer, starting)
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await engine.close()
            raise
        _log.info("%s (%s): %s, since %s", artifact.name, artifact.version, info.engine, why)
        return cls(artifact, engine, LocalStages(files))

    async def generate(
        self, request: TokenRequest, stop: Sequence[str]
    ) -> AsyncIterator[TextChunk]:
        """The text of one sequence, until it ends or meets a stop string.

        Raises:
            EngineError: The request is lost.
        """
        decoder = self.text.decoder(stop)
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
