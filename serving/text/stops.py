"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Piece = tuple[str, bool]  # a text, and whether it is shown: special tokens are not


class Told(NamedTuple):
    """What may be told.

    Attributes:
        text: That is shown.
        end: Characters that have been told since the beginning, those that are not shown, too.
        is_stopped: A stop string came: it and what follows it are not told.
        is_all: Nothing waits.
    """

    text: str
    end: int
    is_stopped: bool
    is_all: bool


class StopStrings:
    """Ends a text before the first stop string; what may be the beginning of one waits.

    Strings are looked for in the text that is shown and in the text with special tokens, so that
    both `<|im_end|>` and a word with a special token in its midst are found.

    Args:
        stops: None of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held: list[Piece] = []
        self._end = 0

    def feed(self, pieces: Iterable[Piece], is_last: bool) -> Told:
        """The next pieces of the text.

        Args:
            pieces: In their order.
            is_last: There are no more, so that nothing waits.
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
        """Texts to look in, with the place of each of their characters, and of their end."""
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
        """How many of the last characters may begin a stop string."""
        for size in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0

    def _tell(self, end: int) -> str:
        """Takes the first characters of what is held; returns those that are shown."""
        told, held = "", list[Piece]()
        for text, is_shown in self._held:
            if is_shown:
                told += text[:end]
            if len(text) > end:
                held.append((text[end:], is_shown))
            end = max(0, end - len(text))
        self._held = held
        return told
