"""The real server over an engine that repeats its prompt: no model, no torch.

    python -m tests.serving.batches.small_gateway LOG DELAY_S key=value ...

LOG gets a line for each prompt that the engine is given.
"""

import asyncio
import logging
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import serving.server
from serving.artifact import Artifact, Format
from serving.command import SERVING
from serving.deployment import Deployment
from serving.engine import EngineError, EngineInfo, EngineStats, TokenChunk
from serving.text.pipeline import LocalStages
from serving.text.tokenizer import TokenizerFiles


class EchoEngine:
    """Says what it was told, after a while; `until NAME` waits for the file LOG.NAME.

    `boom` makes it fail.
    """

    is_ready = True

    def __init__(self, tokenizer, log, delay_s, max_running):
        self.info = EngineInfo("echo 1", max_context=4096, max_running=max_running)
        self._tokenizer, self._log, self._delay_s = tokenizer, Path(log), delay_s

    async def submit(self, request):
        text = self._tokenizer.decode(request.prompt)
        with self._log.open("a") as log:
            log.write(text + "\n")
        if "boom" in text:
            raise EngineError("it went away")
        await asyncio.sleep(self._delay_s)
        _, waits, name = text.rpartition(" until ")
        while waits and not self._log.with_suffix(f".{name}").exists():
            await asyncio.sleep(0.02)
        yield TokenChunk(request.prompt[: request.max_tokens], finish_reason="stop")

    def stats(self):
        return EngineStats()

    async def close(self):
        pass


def tokenizer_files():
    """Bytes are tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return TokenizerFiles(tokenizer.to_str(), {"default": template}, {}, "small")


def main():
    log, delay_s, *settings = sys.argv[1:]
    artifact = Artifact("small", Path("small"), Format.huggingface, "0" * 64, None)

    async def start(_, config, __):
        files = tokenizer_files()
        engine = EchoEngine(files.tokenizer(), log, float(delay_s), config.engine.max_running)
        return Deployment(artifact, engine, LocalStages(files))

    serving.server.resolve = lambda name: artifact
    serving.server.Deployment.start = start
    config = SERVING.compose(settings)
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(serving.server.serve(config))


if __name__ == "__main__":
    main()
