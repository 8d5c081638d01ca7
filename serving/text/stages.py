"""The boundary between text and tokens: what goes into the two stages and what comes out.

    request -> Encoder -> token ids -> engine -> TokenChunk -> Decoder -> TextChunk -> response

Both stages run in the gateway, or in processes of their own (`split.py`); the types are the same.
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
        finds_calls: Whether calls of tools are to be found in the answer.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    finds_calls: bool = False


class TextToken(NamedTuple):
    """A token as a client sees it.

    Attributes:
        id: In the vocabulary.
        text: What it adds to the text; `bytes:` and its bytes where those are no text.
        logprob: Of it.
        raw: Its bytes, where they are not those of `text`.
    """

    id: int
    text: str
    logprob: float
    raw: list[int] | None = None

    @property
    def bytes(self) -> list[int]:
        """All of them."""
        return list(self.text.encode()) if self.raw is None else self.raw


class TextLogprob(NamedTuple):
    """What is told of a token that was generated.

    Attributes:
        token: The token.
        top: The likeliest ones in its place, most likely first.
        offset: Characters of the answer before it.
    """

    token: TextToken
    top: list[TextToken]
    offset: int


class TextChunk(NamedTuple):
    """What a client sees of a `TokenChunk`.

    Attributes:
        text: What may be told; the rest waits for the next chunk.
        num_tokens: That the engine generated.
        logprobs: Of the tokens of that text; None where none were asked for.
        finish_reason: `stop`, `length`; None: there is more to come.
    """

    text: str
    num_tokens: int
    logprobs: list[TextLogprob] | None
    finish_reason: str | None


class Encoder:
    """Text to token ids."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._files, self._tokenizer = files, files.tokenizer()

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
        template = self._files.template(has_tools=bool(chat.tools))
        if template is None:
            raise TextError("messages", "the model has no chat template: use /v1/completions")
        if chat.tools and "tools" not in template:
            raise TextError("tools", "the model's chat template knows no tools")
        if chat.finds_calls and format_of(template) is None:
            rule = "calls as the model's chat template has them are not read here: set tool_choice"
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
        except Exception as e:  # a template is a program of the model's author: anything can come
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise TextError("messages", f"the chat template refuses them: {reason}") from e
        text: str = rendered[0][0]
        return text


class Decoder:
    """Token ids of one sequence to text, a chunk at a time.

    Bytes of a character that is not complete wait, and so does what may be the beginning of a stop
    string, with the log-probabilities of its tokens.

    Args:
        vocabulary: Shared with other decoders.
        stop: Texts that end the sequence; they are not part of it.
        prompt: Token ids that the sequence goes on from.
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
        self._length = self._shown_length = 0  # characters that came out of the detokenizer
        self._waiting: list[tuple[int, TextLogprob]] = []  # where each token begins, and its own

    def feed(self, chunk: TokenChunk) -> TextChunk:
        """The text that a chunk completes; with a `finish_reason`, all of it."""
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
        """Those of tokens whose text was told: a token of a stop string is never among them."""
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
        except UnicodeDecodeError:  # part of a character: written as OpenAI does
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            return TextToken(token, text, logprob, list(raw))
