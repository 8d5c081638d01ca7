"""What the supervisor says: one line on stderr, and one JSON object in the file of events."""

import json
import sys
import time
from pathlib import Path


def say(who: str, text: str) -> None:
    """Prints one line.

    Args:
        who: Its prefix, `supervise` or `join`.
        text: May come from elsewhere: what drives a terminal is taken out.
    """
    line = "".join(c if c.isprintable() else " " for c in text)
    show(f"{who}: {line}")


def show(text: str) -> None:
    """Prints `text` as it is."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody reads any more, which is no reason to end a gang


class Journal:
    """Appends events to a file, once its folder is there.

    The ranks make the run directory, after they have checked that it may be used: a folder made
    here would look like a run to them. Events wait for it, and go nowhere if it never comes.

    Args:
        path: Where; None keeps no events.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._waiting: list[str] = []

    def write(
        self, event: str, generation: int, world_size: int, step: int | None, reason: str
    ) -> None:
        """Notes one event, now."""
        if self._path is None:
            return
        record = {
            "time": time.time(),
            "event": event,
            "generation": generation,
            "world_size": world_size,
            "step": step,
            "reason": reason,
        }
        self._waiting.append(json.dumps(record) + "\n")
        self.flush()

    def flush(self) -> None:
        """Writes what waits, if it can."""
        if self._path is None or not self._waiting or not self._path.parent.is_dir():
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._waiting)
        except OSError as e:  # a full disk, say: the gang goes on without a record of it
            say("supervise", f"--events={self._path} cannot be written, and is given up: {e}")
            self._path = None
        self._waiting.clear()
