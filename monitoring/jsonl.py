"""`metrics.jsonl` and `samples.jsonl`: one JSON object a line, a step at most once.

JSON has no NaN. A float that is not finite is written as the string "NaN", "Infinity" or
"-Infinity", which Python's `float()` and JavaScript's `Number()` read back; null would hide a run
that diverged.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from core.folder import staged_file

Record = Mapping[str, float | int | str]

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def encode(record: Record) -> str:
    """One line of JSON, without the line end.

    Args:
        record: Flat; floats keep full precision.
    """
    return json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False)


def _finite(value: float | int | str) -> float | int | str:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def read_records(path: Path) -> list[dict[str, object]]:
    """The records of a file, in order; lines torn by a crash are left out.

    Args:
        path: A file that `JsonlSink` wrote; an absent one has no records.
    """
    if not path.exists():
        return []
    with path.open("rb") as lines:
        return [record for line in lines if (record := _decode(line)) is not None]


def _decode(line: bytes) -> dict[str, object] | None:
    """The record in a line, or None when the writer was killed half-way through it."""
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
        return record
    return None


def drop_lost_steps(path: Path, first_step: int) -> int:
    """Remove what a resumed run is about to do again, and lines torn by the crash.

    The file is replaced by one atomic rename, so a second crash here loses nothing.

    Args:
        path: A `.jsonl` file; may be absent.
        first_step: The last step that the checkpoint holds; 0 starts afresh and drops everything.

    Returns:
        How many lines were removed.
    """
    if not path.exists():
        return 0
    num_dropped = 0
    with path.open("rb") as old, staged_file(path) as staging, staging.open("wb") as new:
        for line in old:
            if _is_kept(_decode(line), first_step):
                new.write(line)
            else:
                num_dropped += 1
    return num_dropped


def _is_kept(record: dict[str, object] | None, first_step: int) -> bool:
    if record is None or first_step == 0:
        return False
    step = record["step"]
    return isinstance(step, int) and step <= first_step


class JsonlSink:
    """Appends records to a file, a flushed line at a time.

    Args:
        path: The file; its folder must exist.
        first_step: Step that the run goes on from; later lines in the file are dropped.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.num_dropped = drop_lost_steps(path, first_step)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, record: Record) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(encode(record) + "\n")
        self._file.flush()

    def close(self, exit_status: str) -> None:
        """Close the file."""
        self._file.close()
