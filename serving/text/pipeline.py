"""The interface of the two text stages, and their implementation in the gateway's process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from serving.engine import TokenChunk
from serving.text.call_formats import CallFormat, format_of
from serving.text.codec import Chat, Decoder, Encoder, TextChunk
from serving.text.tokenizer import TokenizerFiles, vocab_size
from serving.text.vocabulary import Vocabulary

LONG_TEXT = 20_000  # characters; encoding more would hold up other requests noticeably


class SequenceDecoder(Protocol):
    """Decoder of one sequence, whose chunks are fed in order."""

    async def feed(self, chunk: TokenChunk) -> TextChunk:
        """See `Decoder.feed`; raises EngineError if the request is lost."""
        ...

    def close(self) -> None:
        """Frees the decoder; no further chunks may be fed."""
        ...


class TextStages(Protocol):
    """The stages before and after an engine."""

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        ...

    @property
    def call_format(self) -> CallFormat | None:
        """Format of calls in an answer; None: calls are not parsed."""
        ...

    @property
    def is_ready(self) -> bool:
        """True if both stages would answer now."""
        ...

    @property
    def restarts(self) -> int:
        """Number of times that a process of a stage was started again."""
        ...

    async def encode(self, prompts: Sequence[str | Chat]) -> list[list[int]]:
        """Returns the token ids of each prompt.

        Raises:
            TextError: A prompt cannot be encoded.
            EngineError: The request is lost.
        """
        ...

    def decoder(
        self, stop: Sequence[str], prompt: Sequence[int], shown: Sequence[str] = ()
    ) -> SequenceDecoder:
        """Returns a decoder for a new sequence; see `Decoder`."""
        ...

    async def close(self) -> None:
        """Ends the processes of the stages."""
        ...


class LocalStages:
    """Text stages in this process."""

    is_ready, restarts = True, 0

    def __init__(self, files: TokenizerFiles) -> None:
        tokenizer = files.tokenizer()
        self._encoder, self._vocabulary = Encoder(files), Vocabulary(tokenizer)
        self.vocab_size, self.call_format = vocab_size(tokenizer), call_format(files)

    async def encode(self, prompts: Sequence[str | Chat]) -> list[list[int]]:
        """See `TextStages`."""
        size = sum(length(prompt) for prompt in prompts)
        if size > LONG_TEXT:  # the tokenizer is written in Rust and releases the GIL
            return await asyncio.to_thread(self._encode, prompts)
        return self._encode(prompts)

    def _encode(self, prompts: Sequence[str | Chat]) -> list[list[int]]:
        return [self._encoder.encode(prompt) for prompt in prompts]

    def decoder(
        self, stop: Sequence[str], prompt: Sequence[int], shown: Sequence[str] = ()
    ) -> SequenceDecoder:
        """See `TextStages`."""
        return _LocalDecoder(Decoder(self._vocabulary, stop, prompt, shown))

    async def close(self) -> None:
        """Does nothing, since there are no processes."""


class _LocalDecoder:
    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    async def feed(self, chunk: TokenChunk) -> TextChunk:
        return self._decoder.feed(chunk)

    def close(self) -> None:
        pass


def call_format(files: TokenizerFiles) -> CallFormat | None:
    """Returns the format of calls in answers to chats with tools; None: calls are not parsed."""
    template = files.template(has_tools=True)
    return None if template is None else format_of(template)


def length(prompt: str | Chat) -> int:
    """Returns the approximate number of characters of a prompt."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(str(message.get("content", ""))) for message in prompt.messages)
