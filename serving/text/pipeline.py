"""The two text stages as the gateway calls them, wherever they run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from serving.engine import TokenChunk
from serving.text.call_formats import CallFormat, format_of
from serving.text.stages import Chat, Decoder, Encoder, TextChunk
from serving.text.tokenizer import TokenizerFiles, vocab_size
from serving.text.vocabulary import Vocabulary

LONG_TEXT = 20_000  # characters; more take so long that others would wait


class SequenceDecoder(Protocol):
    """Of one sequence; fed in order."""

    async def feed(self, chunk: TokenChunk) -> TextChunk:
        """See `Decoder.feed`; raises EngineError where the request is lost."""
        ...

    def close(self) -> None:
        """No more comes."""
        ...


class TextStages(Protocol):
    """Before and after an engine."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def call_format(self) -> CallFormat | None:
        """Of calls in an answer; None: they are not read."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether both stages would answer now."""
        ...

    @property
    def restarts(self) -> int:
        """Times that a process of theirs was started again."""
        ...

    async def encode(self, prompts: Sequence[str | Chat]) -> list[list[int]]:
        """Token ids of each.

        Raises:
            TextError: One cannot be made into tokens.
            EngineError: The request is lost.
        """
        ...

    def decoder(
        self, stop: Sequence[str], prompt: Sequence[int], shown: Sequence[str] = ()
    ) -> SequenceDecoder:
        """For one more sequence; see `Decoder`."""
        ...

    async def close(self) -> None:
        """Ends what runs."""
        ...


class LocalStages:
    """In this process."""

    is_ready, restarts = True, 0

    def __init__(self, files: TokenizerFiles) -> None:
        tokenizer = files.tokenizer()
        self._encoder, self._vocabulary = Encoder(files), Vocabulary(tokenizer)
        self.vocab_size, self.call_format = vocab_size(tokenizer), call_format(files)

    async def encode(self, prompts: Sequence[str | Chat]) -> list[list[int]]:
        """See `TextStages`."""
        size = sum(length(prompt) for prompt in prompts)
        if size > LONG_TEXT:  # the library is Rust and lets others run
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
        """Nothing runs."""


class _LocalDecoder:
    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    async def feed(self, chunk: TokenChunk) -> TextChunk:
        return self._decoder.feed(chunk)

    def close(self) -> None:
        pass


def call_format(files: TokenizerFiles) -> CallFormat | None:
    """Of calls in the answers to chats with tools; None: they are not read."""
    template = files.template(has_tools=True)
    return None if template is None else format_of(template)


def length(prompt: str | Chat) -> int:
    """Characters, about."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(str(message.get("content", ""))) for message in prompt.messages)
