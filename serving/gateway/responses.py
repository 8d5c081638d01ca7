"""Responses in OpenAI's shapes: as a whole, or as a stream of events."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection
from typing import Any

from serving.errors import RequestError
from serving.gateway.errors import body_of
from serving.gateway.generation import Chunks, Generation
from serving.text.call_formats import CallParser
from serving.text.codec import TextChunk, TextLogprob, TextToken
from serving.text.tools import WholeCall


class Answer(ABC):
    """The response to one request.

    Args:
        generation: Generation that yields the text.
        include_usage: True: a stream ends with its usage.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, generation: Generation, include_usage: bool) -> None:
        request = generation.request
        self._generation, self._include_usage = generation, include_usage
        self._num_choices = len(request.prompts) * request.n
        self._head = {
            "id": f"{self.prefix}-{request.id}",
            "object": self.kind,
            "created": int(time.time()),
            "model": request.model.name,
            # OpenAI's field for the configuration that responds; here the version of the weights.
            "system_fingerprint": f"fp_{generation.version}",
        }

    async def whole(self, chunks: Chunks) -> dict[str, Any]:
        """Returns the body of a response that is not streamed."""
        choices: list[list[TextChunk]] = [[] for _ in range(self._num_choices)]
        async for index, chunk in chunks:
            choices[index].append(chunk)
        return {
            **self._head,
            "choices": [self._choice(index, parts) for index, parts in enumerate(choices)],
            "usage": self._usage(),
        }

    async def events(self, chunks: Chunks) -> AsyncIterator[bytes]:
        """Yields the response as server-sent events; an error in the middle is the last event."""
        head = self._head | {"object": self.chunk_kind}
        if self._include_usage:
            head["usage"] = None
        try:
            async for index, chunk in chunks:
                for delta in self._deltas(index, chunk):
                    yield _event({**head, "choices": [delta]})
        except RequestError as e:
            yield _event(body_of(e))
            return
        finally:
            await chunks.aclose()
        if self._include_usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    @abstractmethod
    def _choice(self, index: int, parts: list[TextChunk]) -> dict[str, Any]:
        """Returns a choice of a whole response."""

    @abstractmethod
    def _deltas(self, index: int, chunk: TextChunk) -> list[dict[str, Any]]:
        """Returns the choices of a stream's next events; empty: there is nothing to send yet."""

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._generation.prompt_tokens, self._generation.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


class CompletionAnswer(Answer):
    """A response of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, index: int, parts: list[TextChunk]) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(part.text for part in parts),
            "logprobs": _completion_logprobs(parts),
            "finish_reason": parts[-1].finish_reason,
        }

    def _deltas(self, index: int, chunk: TextChunk) -> list[dict[str, Any]]:
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return []
        return [self._choice(index, [chunk])]


class ChatAnswer(Answer):
    """A response of `/v1/chat/completions`.

    Args:
        finds_calls: Names of the functions whose calls are parsed out of the text; None: the text
            is not parsed.
        is_call: True: the whole text is one call.
        is_parallel: True: there may be several calls; False: only the first is returned.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        *args: Any,
        finds_calls: Collection[str] | None,
        is_call: bool,
        is_parallel: bool,
    ) -> None:
        super().__init__(*args)
        self._format = self._generation.deployment.text.call_format
        self._parsers = [self._parser(finds_calls, is_call) for _ in range(self._num_choices)]
        self._is_parallel = is_parallel
        self._calls = [0] * self._num_choices
        self._has_begun = [False] * self._num_choices

    def _parser(self, finds_calls: Collection[str] | None, is_call: bool) -> CallParser | None:
        if is_call:
            return WholeCall()
        if finds_calls is None or self._format is None:
            return None
        return self._format.parser(finds_calls)

    def _choice(self, index: int, parts: list[TextChunk]) -> dict[str, Any]:
        said, calls = self._split(index, "".join(part.text for part in parts), True)
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if calls:
            message |= {"content": said or None, "tool_calls": calls}
        logprobs = [token for part in parts for token in part.logprobs or ()]
        has_logprobs = any(part.logprobs is not None for part in parts)
        return {
            "index": index,
            "message": message,
            "logprobs": _chat_logprobs(logprobs) if has_logprobs else None,
            "finish_reason": "tool_calls" if calls else parts[-1].finish_reason,
        }

    def _deltas(self, index: int, chunk: TextChunk) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        # The first delta of a choice has the role and no text, as OpenAI's has.
        if not self._has_begun[index]:
            self._has_begun[index] = True
            deltas.append(_delta(index, {"role": "assistant", "content": "", "refusal": None}))
        said, calls = self._split(index, chunk.text, chunk.finish_reason is not None)
        if said or chunk.logprobs:
            logprobs = None if chunk.logprobs is None else _chat_logprobs(chunk.logprobs)
            deltas.append(_delta(index, {"content": said}, logprobs))
        first = self._calls[index] - len(calls)
        for at, call in enumerate(calls, first):
            deltas.append(_delta(index, {"tool_calls": [{"index": at, **call}]}))
        if chunk.finish_reason is not None:
            reason = "tool_calls" if self._calls[index] else chunk.finish_reason
            deltas.append(_delta(index, {}, None, reason))
        return deltas

    def _split(self, index: int, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        parser = self._parsers[index]
        if parser is None:
            return text, []
        said, calls = parser.feed(text, is_last)
        # Without parallel calls only the first call of a choice is kept, over all its chunks.
        if not self._is_parallel:
            calls = calls[: 1 - self._calls[index]]
        first = self._calls[index]
        self._calls[index] += len(calls)
        return said, [
            {"id": self._call_id(index, at), "type": "function", "function": call}
            for at, call in enumerate(calls, first)
        ]

    def _call_id(self, index: int, at: int) -> str:
        # Mistral's templates raise for ids that do not have nine letters and digits.
        if self._format is not None and self._format.has_short_ids:
            return f"{self._generation.request.id[:5]}{index:02x}{at:02x}"
        return f"call_{self._generation.request.id[:16]}{index}{at}"


def _delta(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _completion_logprobs(parts: list[TextChunk]) -> dict[str, Any] | None:
    if all(part.logprobs is None for part in parts):
        return None
    found = [logprob for part in parts for logprob in part.logprobs or ()]
    return {
        "tokens": [logprob.token.text for logprob in found],
        "token_logprobs": [logprob.token.logprob for logprob in found],
        "top_logprobs": [_by_text(logprob) for logprob in found],
        "text_offset": [logprob.offset for logprob in found],
    }


def _by_text(found: TextLogprob) -> dict[str, float]:
    """Returns log-probabilities by text: the likeliest tokens and the generated one.

    Several tokens may have the same text. The generated token keeps its text as the key; another
    token with the same text gets its id as the key.
    """
    own, top = found.token, found.top
    if own.id not in (token.id for token in top):
        top = [*top, own]
    names = dict[str, float]()
    for token in top:
        is_taken = token.text in names or (token.text == own.text and token.id != own.id)
        names[f"token_id:{token.id}" if is_taken else token.text] = token.logprob
    return names


def _chat_logprobs(found: list[TextLogprob]) -> dict[str, Any]:
    def described(token: TextToken) -> dict[str, Any]:
        return {"token": token.text, "logprob": token.logprob, "bytes": token.bytes}

    return {
        "content": [
            described(logprob.token) | {"top_logprobs": [described(token) for token in logprob.top]}
            for logprob in found
        ],
        "refusal": None,
    }


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
