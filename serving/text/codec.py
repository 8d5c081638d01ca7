"""The two text stages: the encoder turns text into tokens, the decoder tokens into text.

    request -> Encoder -> token ids -> engine -> TokenChunk -> Decoder -> TextChunk -> response

Both stages run in the gateway or in separate processes (`split.py`), with the same types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from core.errors import SpotforgeError
from serving.engine import TokenChunk, TokenLogprob
from serving.text.call_formats import format_of
from serving.text.detokenizer import Detokenizer
from serving.text.stops import Piece, StopStrings, Told
from serving.text.tokenizer import TokenizerFiles
from serving.text.vocabulary import Vocabulary


class TextError(SpotforgeError):
    """A prompt cannot be encoded, which the client has to correct.

    Args:
        param: Field of the request.
        message: Error in one line, without the field.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param, self.message = param, message


@dataclass(frozen=True)
class Chat:
    """A conversation for the chat template.

    Attributes:
        messages: Messages in OpenAI's shape.
        tools: Tools in OpenAI's shape; None: no tools.
        options: Further variables for the template (`chat_template_kwargs`).
        finds_calls: True: calls of tools are parsed out of the answer.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    finds_calls: bool = False


class TextToken(NamedTuple):
    """A token as a client sees it.

    Attributes:
        id: Token id.
        text: Text that the token adds; `bytes:` and its bytes if these are not valid UTF-8.
        logprob: Log-probability of the token.
        raw: Bytes of the token if they differ from those of `text`.
    """

    id: int
    text: str
    logprob: float
    raw: list[int] | None = None

    @property
    def bytes(self) -> list[int]:
        """Bytes of the token."""
        return list(self.text.encode()) if self.raw is None else self.raw


class TextLogprob(NamedTuple):
    """Log-probabilities of a generated token and its alternatives.

    Attributes:
        token: Generated token.
        top: Likeliest tokens at its position, most likely first.
        offset: Number of characters of the answer before the token.
    """

    token: TextToken
    top: list[TextToken]
    offset: int


class TextChunk(NamedTuple):
    """Text of a `TokenChunk` that may be sent to the client.

    Attributes:
        text: Text that is final; the rest waits for the next chunk.
        num_tokens: Number of tokens that the engine generated.
        logprobs: Log-probabilities of the text's tokens; None: they were not asked for.
        finish_reason: `stop` or `length`; None: more chunks follow.
    """

    text: str
    num_tokens: int
    logprobs: list[TextLogprob] | None
    finish_reason: str | None


class Encoder:
    """Encoder of texts and conversations to token ids."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._files, self._tokenizer = files, files.tokenizer()

    def encode(self, prompt: str | Chat) -> list[int]:
        """Returns the token ids of a text (with BOS if the tokenizer adds it) or a conversation.

        Raises:
            TextError: The template refuses the messages, or the text is empty or not valid.
        """
        is_chat = isinstance(prompt, Chat)
        text = self._render(prompt) if isinstance(prompt, Chat) else prompt
        param = "messages" if is_chat else "prompt"
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise TextError(param, "has an unpaired surrogate, which is not a character") from e
        # A chat template writes the special tokens itself, BOS included.
        ids = self._tokenizer.encode(text, add_special_tokens=not is_chat).ids
        if not ids:
            raise TextError(param, "is empty")
        return list(ids)

    def _render(self, chat: Chat) -> str:
        template = self._files.template(has_tools=bool(chat.tools))
        if template is None:
            raise TextError("messages", "the model has no chat template: use /v1/completions")
        if chat.tools and "tools" not in template:
            raise TextError("tools", "the model's chat template does not support tools")
        if chat.finds_calls and format_of(template) is None:
            rule = (
                "the format of calls in the model's chat template is not supported: set tool_choice"
            )
            raise TextError("tools", f"{rule} to required, to a function, or to none")
        try:
            tools: Any = chat.tools
            rendered: Any = render_jinja_template(
                conversations=[chat.messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=True,
                **{**self._files.special_tokens, **chat.options},
            )
        except Exception as e:  # a template is a program of the model's author: it may raise any
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise TextError("messages", f"the chat template refuses them: {reason}") from e
        text: str = rendered[0][0]
        return text


class Decoder:
    """Decoder of one sequence to text, a chunk at a time.

    The bytes of an incomplete character wait for the next chunk, and so does a possible beginning
    of a stop string, with the log-probabilities of its tokens.

    Args:
        vocabulary: Vocabulary, shared with other decoders.
        stop: Texts that end the sequence and are not part of it.
        prompt: Token ids before the sequence.
        shown: Special tokens that are part of the text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: Sequence[str],
        prompt: Sequence[int] = (),
        shown: Sequence[str] = (),
    ) -> None:
        self._vocabulary, self._shown = vocabulary, shown
        self._detokenizer = Detokenizer(vocabulary, prompt)
        self._stops = StopStrings([text for text in stop if text])
        self._has_stops = any(stop)
        self._length = self._shown_length = 0  # characters that the detokenizer returned
        # Log-probabilities that wait for their text, with the offset at which their token begins.
        self._waiting: list[tuple[int, TextLogprob]] = []

    def feed(self, chunk: TokenChunk) -> TextChunk:
        """Returns the text that a chunk completes; with a `finish_reason`, all that remains."""
        pieces: list[Piece] = []
        if chunk.text is not None:
            self._add(pieces, chunk.text, True)
        for i, token in enumerate(chunk.tokens):
            if chunk.logprobs is not None:
                self._waiting.append((self._length, self._describe(token, chunk.logprobs[i])))
            special = self._vocabulary.special.get(token)
            if special is None:
                self._add(pieces, self._detokenizer.step(token), True)
            else:
                # Also added if it is not shown: a stop string may contain special tokens.
                self._add(pieces, special, special in self._shown)
        is_last = chunk.finish_reason is not None
        if is_last:
            self._add(pieces, self._detokenizer.rest(), True)
        told = self._stops.feed(pieces, is_last)
        has_logprobs = chunk.logprobs is not None or bool(self._waiting)
        logprobs = self._ready(told, is_last) if has_logprobs else None
        reason = "stop" if told.is_stopped else chunk.finish_reason
        return TextChunk(told.text, chunk.num_tokens, logprobs, reason)

    def _add(self, pieces: list[Piece], text: str, is_shown: bool) -> None:
        pieces.append((text, is_shown))
        self._length += len(text)
        self._shown_length += len(text) if is_shown else 0

    def _ready(self, told: Told, is_last: bool) -> list[TextLogprob]:
        """Takes the log-probabilities of tokens whose text was sent, without a stop string's."""
        is_all = told.is_all and not (self._has_stops and self._detokenizer.is_waiting)
        count = len(self._waiting)
        if told.is_stopped or not (is_all or is_last):
            count = sum(begin < told.end for begin, _ in self._waiting)
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return [logprob for _, logprob in ready]

    def _describe(self, token: int, found: TokenLogprob) -> TextLogprob:
        top = [self._token(other, logprob) for other, logprob in found.top]
        return TextLogprob(self._token(token, found.logprob), top, self._shown_length)

    def _token(self, token: int, logprob: float) -> TextToken:
        raw = self._vocabulary.bytes_of(token)
        if raw is None:
            return TextToken(token, self._detokenizer.text_of(token), logprob)
        try:
            return TextToken(token, raw.decode(), logprob)
        except UnicodeDecodeError:  # a part of a character is written as OpenAI does
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            return TextToken(token, text, logprob, list(raw))
