"""`events.jsonl`: what happened to a run, one JSON object an event, never rewritten.

Where `metrics.jsonl` holds the steps that count, this holds how they came about: every start, save,
stop and loss, so that goodput can be told. Each has `time` (Unix seconds), `event` and `step`:

    start         world_size, strategy; lost_steps (done before, to be done again), startup_s
    checkpoint    blocking_s, write_s, size_bytes
    upload        upload_s; or upload_failed: error
    passed_over   checkpoint, reason: one that was damaged
    skip          loss, reason; or rollback: to_step too
    stop          reason
    finish
    fail          error
"""

import threading
import time
from pathlib import Path

from monitoring.jsonl import encode, read_records


class EventLog:
    """Appends events; any thread may."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def write(self, event: str, step: int, **details: float | int | str) -> None:
        """Append one event and hand it to the operating system."""
        line = encode({"time": time.time(), "event": event, "step": step, **details})
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_events(run_dir: Path) -> list[dict[str, object]]:
    """The events of a run in order; none where it has no such file."""
    return read_records(run_dir / "events.jsonl")
