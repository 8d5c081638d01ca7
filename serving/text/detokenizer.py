"""Decodes the tokens of an answer one at a time, to exactly the text of decoding them all at once.

The text of new tokens is `decode(prompt + new)[len(decode(prompt)):]`. The text of a token depends
on the tokens before it, since SentencePiece drops the space that begins a text and keeps all
others. Decoding everything again for each token would take quadratic time, so only a window is
decoded: the last tokens whose text is complete, and the tokens since.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.text.vocabulary import Vocabulary

CONTEXT_TOKENS = 256  # last tokens of the prompt that can affect the text of the next token
_FIRST_WINDOW = 8
_LONGEST_WAIT = 32  # tokens without a whole character, after which some of them are given up
_KEPT = 16  # tokens of the window that are kept then
_UNCERTAIN = 4  # characters at the end of a text that the next token may still change
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The decoding of one sequence.

    Args:
        vocabulary: Vocabulary of the tokenizer.
        prompt: Token ids before the text, of which the last `CONTEXT_TOKENS` are used.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._window = self._context(prompt)
        self._past = len(self._window)  # tokens of the window whose text has been returned
        self._given = len(vocabulary.decode(self._window))  # characters of that text

    @property
    def is_waiting(self) -> bool:
        """True if there are tokens whose text has not been returned yet."""
        return len(self._window) > self._past

    def step(self, token: int) -> str:
        """Returns the text that the next token, which must not be special, completes."""
        self._window.append(token)
        text = self._vocabulary.decode(self._window)
        # A replacement character at the end stands for the first bytes of a character.
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
        """Returns the remaining text at the end, such as an incomplete character."""
        return self._vocabulary.decode(self._window)[self._given :]

    def text_of(self, token: int) -> str:
        """Returns what a token would add to the text if it came next."""
        before = self._vocabulary.decode(self._window)
        return self._vocabulary.decode([*self._window, token])[len(before) :]

    def _give_up(self, text: str) -> str:
        """Returns text that the next token cannot change, to bound the length of the window."""
        uncertain = min(_UNCERTAIN, len(text) - self._given)
        new = text[self._given : len(text) - uncertain]
        self._window = self._window[-_KEPT:]
        self._past = 0
        self._given = len(self._vocabulary.decode(self._window)) - uncertain
        return new

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """Returns the prompt's last tokens, as many as affect the text of the next ones."""
        special = self._vocabulary.special
        tokens = [token for token in prompt[-CONTEXT_TOKENS:] if token not in special]
        size = _FIRST_WINDOW
        while size < len(tokens):
            window = tokens[-size:]
            text = self._vocabulary.decode(window)
            # After a window without text, the next token would lose its space as the first of a
            # text; a window that begins within the bytes of a character would break the character.
            is_whole = not text.startswith(_REPLACEMENT) and not self._vocabulary.is_byte(window[0])
            if text and is_whole:
                return window
            size *= 2
        return tokens
