"""The boundary between text and tokens: what goes into the two stages and what comes out.

    request -> Encoder -> token ids -> engine -> TokenChunk -> Decoder -> TextChunk -> response

Both stages run in the gateway, or in processes of their own (`split.py`); the types are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers.utils.chat_template_utils import render_jinja_template

from monitoring.errors import SpotforgeError
from serving.engine import TokenChunk
from serving.text.tokenizer import TokenizerFiles


class TextError(SpotforgeError):
    """A prompt that cannot be made into tokens; the client's to mend.

    Args:
        param: Field of the request.
        message: What is wrong with it.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param, self.message = param, message


@dataclass(frozen=True)
class Chat:
    """Messages for the chat template.

    Attributes:
        messages: As OpenAI has them.
        tools: Likewise; None: none.
        options: More variables for the template (`chat_template_kwargs`).
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


class TextLogprob(NamedTuple):
    """Of one token: its text and bytes, its log-probability, and the likeliest others."""

    text: str
    logprob: float
    top: list[tuple[str, float]]


class TextChunk(NamedTuple):
    """What a client sees of a `TokenChunk`.

    Attributes:
        text: What may be told; the rest waits for the next chunk.
        num_tokens: That the engine generated.
        logprobs: For each token; None where none were asked for.
        finish_reason: `stop`, `length`; None: there is more to come.
    """

    text: str
    num_tokens: int
    logprobs: list[TextLogprob] | None
    finish_reason: str | None


class Encoder:
    """Text to token ids."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._tokenizer = files.tokenizer()
        self._templates, self._special = files.chat_template, files.special_tokens

    def encode(self, prompt: str | Chat) -> list[int]:
        """Token ids of a text (with BOS, where the tokenizer adds one) or of a conversation.

        Raises:
            TextError: The template refuses the messages, or nothing is left of them.
        """
        is_chat = isinstance(prompt, Chat)
        text = self._render(prompt) if isinstance(prompt, Chat) else prompt
        param = "messages" if is_chat else "prompt"
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise TextError(param, "has half of a surrogate pair, which is no character") from e
        ids = self._tokenizer.encode(text, add_special_tokens=not is_chat).ids
        if not ids:
            raise TextError(param, "is empty")
        return list(ids)

    def _render(self, chat: Chat) -> str:
        name = "tool_use" if chat.tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise TextError("messages", "the model has no chat template: use /v1/completions")
        if chat.tools and "tools" not in template:
            raise TextError("tools", "the model's chat template knows no tools")
        try:
            tools: Any = chat.tools
            rendered: Any = render_jinja_template(
                conversations=[chat.messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=True,
                **{**self._special, **chat.options},
            )
        except Exception as e:  # a template is a program of the model's author: anything can come
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise TextError("messages", f"the chat template refuses them: {reason}") from e
        text: str = rendered[0][0]
        return text


class Decoder:
    """Token ids of one sequence to text, a chunk at a time.

    Bytes of a character that is not complete wait, and so does what may be the beginning of a stop
    string.

    Args:
        tokenizer: Shared with other decoders.
        stop: Texts that end the sequence; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded = 0  # characters that came out of the stream
        self._held = ""

    def feed(self, chunk: TokenChunk) -> TextChunk:
        """The text that a chunk completes; with a `finish_reason`, all of it."""
        text = chunk.text or ""
        for token in chunk.tokens if chunk.text is None else ():
            text += self._stream.step(self._tokenizer, token) or ""
        self._tokens += chunk.tokens
        self._decoded += len(text)
        if chunk.finish_reason is not None and chunk.text is None:
            text += self._rest()
        text, reason = self._until_stop(self._held + text, chunk.finish_reason)
        return TextChunk(text, chunk.num_tokens, self._logprobs(chunk), reason)

    def _rest(self) -> str:
        """What the stream kept back: a character whose last bytes never came."""
        if not self._tokens:
            return ""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return str(whole[self._decoded :])

    def _until_stop(self, text: str, reason: str | None) -> tuple[str, str | None]:
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], "stop"
        hold = 0
        if reason is None and self._stop:
            longest = min(len(text), max(map(len, self._stop)) - 1)
            for size in range(longest, 0, -1):
                if any(stop.startswith(text[-size:]) for stop in self._stop):
                    hold = size
                    break
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], reason

    def _logprobs(self, chunk: TokenChunk) -> list[TextLogprob] | None:
        if chunk.logprobs is None:
            return None
        return [
            TextLogprob(
                self._text(token), found.logprob, [(self._text(t), p) for t, p in found.top]
            )
            for token, found in zip(chunk.tokens, chunk.logprobs, strict=True)
        ]

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))
