"""A text stage as a process: `python -m serving.text.worker encode|decode`; see `split.py`.

One thread reads, works and writes; chunks that came in one read are answered in one write. Only
long prompts are encoded in other threads, so that short ones do not wait for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from core.process.json_lines import IDLE_S, JsonLines, Message
from serving.engine import TokenChunk, TokenLogprob
from serving.text.codec import Chat, Decoder, Encoder, TextError
from serving.text.pipeline import LONG_TEXT, length
from serving.text.tokenizer import TokenizerFiles, vocab_size
from serving.text.vocabulary import Vocabulary

_LONG_AT_ONCE = 2  # long prompts that are encoded at once


class EncodeStage:
    """Stage that encodes texts and conversations to token ids.

    Args:
        files: Files of the tokenizer.
        say: Function that sends an answer as soon as it is there.
    """

    def __init__(self, files: TokenizerFiles, say: Callable[[str, Any], None]) -> None:
        self._encoder, self._say = Encoder(files), say
        # Threads help, since the tokenizer is written in Rust and releases the GIL.
        self._threads = ThreadPoolExecutor(_LONG_AT_ONCE)

    def hear(self, kind: str, content: Any) -> Iterator[Message]:
        """Handles a message; sends the answer itself and returns none."""
        id, prompt = content
        if isinstance(prompt, dict):
            prompt = Chat(**prompt)
        if length(prompt) > LONG_TEXT:
            self._threads.submit(self._answer, id, prompt)
        else:
            self._answer(id, prompt)
        return iter(())

    def _answer(self, id: int, prompt: str | Chat) -> None:
        try:
            answer: Message = "tokens", (id, self._encoder.encode(prompt))
        except TextError as e:
            answer = "refused", (id, e.param, e.message)
        except Exception as e:
            answer = _failed(id, e)
        self._say(*answer)


class DecodeStage:
    """Stage that decodes the tokens of sequences to text.

    Args:
        files: Files of the tokenizer.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._vocabulary = Vocabulary(files.tokenizer())
        self._decoders: dict[int, Decoder] = {}

    def hear(self, kind: str, content: Any) -> Iterator[Message]:
        """Handles a message; yields the answers."""
        if kind == "close":
            self._decoders.pop(content, None)
            return
        id, *rest = content
        try:
            if kind == "open":
                *opening, past = rest
                self._decoders[id] = decoder = Decoder(self._vocabulary, *opening)
                # Rebuilds the state of a sequence that another process had.
                for tokens, text in past:
                    decoder.feed(TokenChunk(tokens, text=text))
            else:
                yield "text", (id, *self._decoders[id].feed(_chunk(*rest)))
        except Exception as e:
            yield _failed(id, e)


def _chunk(tokens: list[int], logprobs: Any, *rest: Any) -> TokenChunk:
    if logprobs is not None:
        logprobs = [TokenLogprob(own, top) for own, top in logprobs]
    return TokenChunk(tokens, logprobs, *rest)


def _failed(id: int, error: Exception) -> Message:
    first = (str(error).splitlines() or [""])[0]
    return "failed", (id, f"{type(error).__name__}: {first}")


def main(arguments: list[str]) -> None:
    """Runs a stage until the gateway has ended."""
    pipe = JsonLines()
    messages: list[Message] = []
    while not messages:
        messages = pipe.heard(IDLE_S)
    (_, content), *messages = messages
    files = TokenizerFiles(**content)
    stage = EncodeStage(files, pipe.say) if arguments == ["encode"] else DecodeStage(files)
    pipe.say("ready", vocab_size(files.tokenizer()))
    while True:
        pipe.say_all([answer for message in messages for answer in stage.hear(*message)])
        messages = pipe.heard(IDLE_S)
        if not messages:
            pipe.say("idle", True)


if __name__ == "__main__":
    main(sys.argv[1:])
