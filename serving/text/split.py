"""The text stages as separate processes, any number of each.

A prompt goes to the encoder with the lowest load. A sequence stays with one decoder from its first
to its last token, since a decoder has a state; if its process dies, another one is fed the sequence
so far and goes on. A stage reads and writes one JSON object a line on its standard input and
output; N is the number of a prompt or sequence:

    gateway -> encode, decode
        {"files": {...}}                      first of all: the fields of `TokenizerFiles`
        end of file                           the gateway has ended: exit
    encode, decode -> gateway
        {"ready": 32000}                      once, the size of the vocabulary
        {"failed": [N, "one line"]}           the stage failed at a message
        {"idle": true}                        twice a second while there is nothing to do

    gateway -> encode
        {"encode": [N, PROMPT]}               PROMPT: a text, or the fields of `Chat`
    encode -> gateway
        {"tokens": [N, [1, 2, ...]]}
        {"refused": [N, PARAM, MESSAGE]}      the fields of `TextError`

    gateway -> decode
        {"open": [N, [STOP, ...], PROMPT, [SHOWN, ...], [[TOKENS, TEXT], ...]]}    PROMPT: its last
                                              tokens; then the chunks that another process decoded
        {"feed": [N, TOKENS, LOGPROBS, FINISH_REASON, TEXT, TEXT_TOKENS]}
        {"close": N}
    decode -> gateway
        {"text": [N, TEXT, NUM_TOKENS, LOGPROBS, FINISH_REASON]}  `TextChunk`, one for each feed

Prompts may be answered out of order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from serving.engine import TokenChunk
from serving.text.codec import Chat, TextChunk, TextLogprob, TextToken
from serving.text.detokenizer import CONTEXT_TOKENS
from serving.text.pipeline import call_format, length
from serving.text.pool import Pool, Work, all_of
from serving.text.tokenizer import TokenizerFiles

_LOAD_OF_A_PROMPT = 1_000  # fixed cost of a prompt, in characters


class SplitStages:
    """Text stages in separate processes.

    Args:
        files: Files of the tokenizer.
        encoders: Number of processes that turn text into tokens.
        decoders: Number of processes that turn tokens into text.
        silence_s: Seconds after which a process that sends nothing and uses no CPU is replaced.
    """

    def __init__(
        self, files: TokenizerFiles, encoders: int = 1, decoders: int = 1, silence_s: float = 3.0
    ) -> None:
        self.call_format = call_format(files)
        self.encoders = Pool("encode", files, encoders, silence_s)
        self.decoders = Pool("decode", files, decoders, silence_s)

    async def start(self) -> None:
        """Starts all processes and waits until they are ready.

        Raises:
            SpotforgeError: A process does not start; no process is left running.
        """
        try:
            await all_of([self.encoders.start(), self.decoders.start()])
        except BaseException:
            await self.close()
            raise

    @property
    def vocab_size(self) -> int:
        """See `TextStages`."""
        return self.encoders.workers[0].vocab_size

    @property
    def is_ready(self) -> bool:
        """See `TextStages`."""
        return self.encoders.is_ready and self.decoders.is_ready

    @property
    def restarts(self) -> int:
        """See `TextStages`."""
        workers = self.encoders.workers + self.decoders.workers
        return sum(worker.restarts for worker in workers)

    async def encode(self, prompts: Sequence[str | Chat]) -> list[list[int]]:
        """See `TextStages`."""
        return await all_of([self._encode(prompt) for prompt in prompts])

    async def _encode(self, prompt: str | Chat) -> list[int]:
        work = _Prompt(self.encoders.new_id(), prompt)
        answer = work.ask()
        self.encoders.add(work)
        try:
            tokens: list[int] = await answer
            return tokens
        finally:
            self.encoders.remove(work)

    def decoder(
        self, stop: Sequence[str], prompt: Sequence[int], shown: Sequence[str] = ()
    ) -> _SplitDecoder:
        """See `TextStages`."""
        return _SplitDecoder(self.decoders, stop, prompt[-CONTEXT_TOKENS:], shown)

    async def close(self) -> None:
        """See `TextStages`."""
        await asyncio.gather(self.encoders.close(), self.decoders.close())


class _Prompt(Work):
    def __init__(self, id: int, prompt: str | Chat) -> None:
        super().__init__(id, _LOAD_OF_A_PROMPT + length(prompt))
        self._prompt: str | dict[str, Any]
        if isinstance(prompt, Chat):
            self._prompt = vars(prompt)
        else:
            self._prompt = prompt

    def messages(self) -> list[tuple[str, Any]]:
        return [("encode", (self.id, self._prompt))]

    def on_answer(self, content: Any) -> None:
        assert self.answer is not None
        self.answer.set_result(content[0])


class _SplitDecoder(Work):
    """A `SequenceDecoder` whose state is in another process."""

    def __init__(self, pool: Pool, *opening: Sequence[Any]) -> None:
        super().__init__(pool.new_id(), load=1)
        self._pool, self._opening = pool, opening  # arguments of the `Decoder`
        self._past: list[tuple[list[int], str | None]] = []
        self._chunk = TokenChunk([])  # the chunk that was fed last
        pool.add(self)

    async def feed(self, chunk: TokenChunk) -> TextChunk:
        self._chunk, answer = chunk, self.ask()
        # Without a worker, `messages` has the chunk for the next one.
        if self.worker is not None:
            self.worker.say("feed", (self.id, *chunk))
        text: TextChunk = await answer
        return text

    def close(self) -> None:
        if self.worker is not None:
            self.worker.say("close", self.id)
        self._pool.remove(self)

    def messages(self) -> list[tuple[str, Any]]:
        opened = ("open", (self.id, *self._opening, self._past))
        return [opened, ("feed", (self.id, *self._chunk))] if self.is_waiting else [opened]

    def on_answer(self, content: Any) -> None:
        assert self.answer is not None
        # Here and not in `feed`, whose task resumes later: the process may be replaced in between,
        # and the next one would not be fed this chunk.
        self._past.append((self._chunk.tokens, self._chunk.text))
        text, num_tokens, logprobs, reason = content
        if logprobs is not None:
            logprobs = [
                TextLogprob(TextToken(*own), [TextToken(*other) for other in top], offset)
                for own, top, offset in logprobs
            ]
        self.answer.set_result(TextChunk(text, num_tokens, logprobs, reason))
