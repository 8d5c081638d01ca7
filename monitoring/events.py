"""Events of a run in `events.jsonl`: one JSON object per event, never rewritten.

While `metrics.jsonl` holds the steps that count, this file holds how they came about: every start,
save, stop and loss, from which goodput is computed. Each event has `time` (Unix seconds, by the
run's clock), `event` and `step`:

start         world_size, strategy; lost_steps (done before, to be repeated), startup_s
    checkpoint    blocking_s, write_s, size_bytes
    upload        upload_s; or upload_failed, once for many attempts: error
    passed_over   checkpoint, reason: a checkpoint was skipped because it was damaged
    skip          loss, reason; or rollback: to_step too
    stop          reason
    finish
    fail          error
"""

import threading
from pathlib import Path

from core import layout
from core.clock import now
from monitoring.jsonl import encode, read_records


class EventLog:
    """Appends events to a file; safe to call from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def write(self, event: str, step: int, **details: float | int | str) -> None:
        """Appends one event and hands it to the operating system."""
        line = encode({"time": now(), "event": event, "step": step, **details})
        # Opened each time: events are rare, and a mounted bucket uploads a file when it is closed.
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_events(run_dir: Path) -> list[dict[str, object]]:
    """Returns the events of a run in order; an empty list if the file does not exist."""
    return read_records(run_dir / layout.EVENTS)
