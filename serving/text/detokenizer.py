"""Tokens of an answer to text, a token at a time, exactly as if all had been decoded at once.

The text of new tokens is `decode(prompt + new)[len(decode(prompt)):]`: what a token is depends on
those before it, since SentencePiece drops the space that begins a text and keeps all others. To
decode everything again for each token would cost its square, so only a window is: the last tokens
whose text is complete, and those that came since.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.text.vocabulary import Vocabulary

CONTEXT_TOKENS = 256  # of the prompt; more never decide what comes after them
_FIRST_WINDOW = 8
_LONGEST_WAIT = 32  # tokens without a whole character: nobody's text
_KEPT = 16  # of those
_UNCERTAIN = 4  # characters at a text's end that the next token may still change
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Of one sequence.

    Args:
        vocabulary: Of the tokenizer.
        prompt: Tokens that the text goes on from; the last `CONTEXT_TOKENS` are looked at.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._window = self._context(prompt)
        self._past = len(self._window)  # tokens of the window whose text has been given
        self._given = len(vocabulary.decode(self._window))  # characters of it, likewise

    @property
    def is_waiting(self) -> bool:
        """Whether tokens came whose text is to be given yet."""
        return len(self._window) > self._past

    def step(self, token: int) -> str:
        """The text that one more token completes; a special one is not among them."""
        self._window.append(token)
        text = self._vocabulary.decode(self._window)
        if len(text) > self._given and not text.endswith(_REPLACEMENT):
            new = text[self._given :]
            del self._window[: self._past]
            self._given = len(self._vocabulary.decode(self._window))
            self._past = len(self._window)
            return new
        if len(self._window) - self._past > _LONGEST_WAIT:
            return self._give_up(text)
        return ""

    def rest(self) -> str:
        """What waited for more, which does not come: a character that is not complete."""
        return self._vocabulary.decode(self._window)[self._given :]

    def text_of(self, token: int) -> str:
        """What a token would add to the text if it came next."""
        before = self._vocabulary.decode(self._window)
        return self._vocabulary.decode([*self._window, token])[len(before) :]

    def _give_up(self, text: str) -> str:
        """Gives what no token changes any more, so that the window does not grow for ever."""
        uncertain = min(_UNCERTAIN, len(text) - self._given)
        new = text[self._given : len(text) - uncertain]
        self._window = self._window[-_KEPT:]
        self._past = 0
        self._given = len(self._vocabulary.decode(self._window)) - uncertain
        return new

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens, as many as the text of the next ones depends on."""
        special = self._vocabulary.special
        tokens = [token for token in prompt[-CONTEXT_TOKENS:] if token not in special]
        size = _FIRST_WINDOW
        while size < len(tokens):
            window = tokens[-size:]
            text = self._vocabulary.decode(window)
            # One without text would take the space that begins a text from the next token; and
            # one that begins amid the bytes of a character would spoil that character.
            is_whole = not text.startswith(_REPLACEMENT) and not self._vocabulary.is_byte(window[0])
            if text and is_whole:
                return window
            size *= 2
        return tokens
