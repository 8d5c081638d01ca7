"""Finds stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Piece = tuple[str, bool]  # a text, and whether it is shown (most special tokens are not)


class Told(NamedTuple):
    """Text that is final.

    Attributes:
        text: Text that is shown.
        end: Number of characters that are final since the beginning, shown or not.
        is_stopped: True: a stop string was found; it and the text after it are dropped.
        is_all: True: no text waits for the next pieces.
    """

    text: str
    end: int
    is_stopped: bool
    is_all: bool


class StopStrings:
    """A text that ends before the first stop string; a possible beginning of one is held back.

    Strings are searched in the shown text and in the text with special tokens, so that both
    `<|im_end|>` and a word with a special token in the middle are found.

    Args:
        stops: Stop strings, none of which is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held: list[Piece] = []
        self._end = 0

    def feed(self, pieces: Iterable[Piece], is_last: bool) -> Told:
        """Adds the next pieces of the text; returns the text that is final.

        Args:
            pieces: Pieces in order.
            is_last: True: there are no more pieces, so nothing is held back.
        """
        self._held += pieces
        size = sum(len(text) for text, _ in self._held)
        end, is_stopped = size, False
        if self._stops:
            views = self._views(size)
            found = [at[i] for text, at in views for i in self._matches(text)]
            is_stopped = bool(found)
            if found:
                end = min(found)
            elif not is_last:
                end = min(at[len(text) - self._hold(text)] for text, at in views)
        text = self._tell(end)
        self._end += end
        return Told(text, self._end, is_stopped, end == size)

    def _views(self, size: int) -> list[tuple[str, Sequence[int]]]:
        """Returns the texts to search, with the offset of each character and of the end."""
        views: list[tuple[str, Sequence[int]]] = [
            ("".join(text for text, _ in self._held), range(size + 1))
        ]
        if not all(is_shown for _, is_shown in self._held):
            shown, places, place = "", list[int](), 0
            for text, is_shown in self._held:
                if is_shown:
                    shown += text
                    places += range(place, place + len(text))
                place += len(text)
            views.append((shown, [*places, size]))
        return views

    def _matches(self, text: str) -> list[int]:
        return [at for stop in self._stops if (at := text.find(stop)) >= 0]

    def _hold(self, text: str) -> int:
        """Returns how many of a text's last characters may be the beginning of a stop string."""
        for size in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0

    def _tell(self, end: int) -> str:
        """Takes the first characters of the held text; returns those that are shown."""
        told, held = "", list[Piece]()
        for text, is_shown in self._held:
            if is_shown:
                told += text[:end]
            if len(text) > end:
                held.append((text[end:], is_shown))
            end = max(0, end - len(text))
        self._held = held
        return told
