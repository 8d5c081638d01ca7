"""Output of the supervisor: lines on stderr, and JSON objects in the file of events."""

import json
import sys
import time
from pathlib import Path


def say(who: str, text: str) -> None:
    """Prints one line to stderr.

    Args:
        who: Prefix of the line, e.g. `supervise` or `join`.
        text: Text of the line. It may come from another machine, so that control characters are
            replaced by spaces.
    """
    line = "".join(c if c.isprintable() else " " for c in text)
    show(f"{who}: {line}")


def show(text: str) -> None:
    """Prints `text` to stderr unchanged."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass  # the reader of stderr is gone, which must not end the gang


class Journal:
    """Appends events to a file, once its folder exists.

    The ranks create the run directory after checking that it may be used; a folder created here
    would look like an earlier run to them. Events wait for the folder, and are dropped if it is
    never created.

    Args:
        path: File of events; None: events are not kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._waiting: list[str] = []

    def write(
        self,
        event: str,
        generation: int,
        world_size: int,
        step: int | None,
        reason: str,
        **details: float | str,
    ) -> None:
        """Appends one event with the current time; `details` are fields that only it has."""
        if self._path is None:
            return
        record = {
            "time": time.time(),
            "event": event,
            "generation": generation,
            "world_size": world_size,
            "step": step,
            "reason": reason,
            **details,
        }
        self._waiting.append(json.dumps(record) + "\n")
        self.flush()

    def flush(self) -> None:
        """Writes the waiting events if the folder exists."""
        if self._path is None or not self._waiting or not self._path.parent.is_dir():
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._waiting)
        except OSError as e:  # e.g. a full disk: the gang goes on without events
            say("supervise", f"--events={self._path} cannot be written, and is given up: {e}")
            self._path = None
        self._waiting.clear()
