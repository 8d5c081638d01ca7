"""A text stage as a process: `python -m serving.text.worker encode|decode`; see `split.py`.

One thread reads, works and writes: chunks that came in one read are answered in one write. Only
what takes long is encoded beside it, so that short prompts do not wait for it.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving.engine import TokenChunk, TokenLogprob
from serving.text.pipeline import LONG_TEXT, length
from serving.text.stages import Chat, Decoder, Encoder, TextError
from serving.text.tokenizer import TokenizerFiles, vocab_size
from serving.text.vocabulary import Vocabulary

IDLE_S = 0.5  # between two signs of life
_BLOCK_BYTES = 1 << 20
_LONG_AT_ONCE = 2
_encode = json.JSONEncoder(separators=(",", ":")).encode
Answer = tuple[str, Any]


class EncodeStage:
    """Texts and conversations to token ids.

    Args:
        files: Of the tokenizer.
        say: For its answers, each as soon as it is there.
    """

    def __init__(self, files: TokenizerFiles, say: Callable[[Answer], None]) -> None:
        self._encoder, self._say = Encoder(files), say
        self._threads = ThreadPoolExecutor(_LONG_AT_ONCE)  # the library is Rust and lets others run

    def hear(self, kind: str, content: Any) -> Iterator[Answer]:
        """Says its answer itself."""
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
            answer: Answer = "tokens", (id, self._encoder.encode(prompt))
        except TextError as e:
            answer = "refused", (id, e.param, e.message)
        except Exception as e:
            answer = _failed(id, e)
        self._say(answer)


class DecodeStage:
    """Tokens of sequences to text.

    Args:
        files: Of the tokenizer.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._vocabulary = Vocabulary(files.tokenizer())
        self._decoders: dict[int, Decoder] = {}

    def hear(self, kind: str, content: Any) -> Iterator[Answer]:
        """Answers to one message."""
        if kind == "close":
            self._decoders.pop(content, None)
            return
        id, *rest = content
        try:
            if kind == "open":
                *opening, past = rest
                self._decoders[id] = decoder = Decoder(self._vocabulary, *opening)
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


def _failed(id: int, error: Exception) -> Answer:
    first = (str(error).splitlines() or [""])[0]
    return "failed", (id, f"{type(error).__name__}: {first}")


class _Pipe:
    """Standard input and output; what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self._rest, self._lock = b"", threading.Lock()

    def say(self, *answers: Answer) -> None:
        """A line for each, in one write; ends the process when the gateway is gone."""
        data = memoryview(b"".join(_encode({k: v}).encode() + b"\n" for k, v in answers))
        try:
            with self._lock:
                while data:
                    data = data[self._out.write(data) :]
        except OSError:
            os._exit(0)

    def heard(self) -> list[tuple[str, Any]]:
        """What came since; nothing: it is quiet. Ends the process when the gateway is gone."""
        if not select.select([0], [], [], IDLE_S)[0]:
            return []
        block = os.read(0, _BLOCK_BYTES)
        if not block:
            os._exit(0)
        *lines, self._rest = (self._rest + block).split(b"\n")
        return [item for line in lines for item in json.loads(line).items()]


def main(arguments: list[str]) -> None:
    """Entry point."""
    pipe = _Pipe()
    messages: list[tuple[str, Any]] = []
    while not messages:
        messages = pipe.heard()
    (_, content), *messages = messages
    files = TokenizerFiles(**content)
    stage = EncodeStage(files, pipe.say) if arguments == ["encode"] else DecodeStage(files)
    pipe.say(("ready", vocab_size(files.tokenizer())))
    while True:
        answers = [answer for message in messages for answer in stage.hear(*message)]
        pipe.say(*answers)
        messages = pipe.heard()
        if not messages:
            pipe.say(("idle", True))


if __name__ == "__main__":
    main(sys.argv[1:])
