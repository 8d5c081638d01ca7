"""Reads and writes `metrics.jsonl` and `samples.jsonl`: one JSON object a line, in order of steps.

JSON has no NaN. A float that is not finite is written as the string "NaN", "Infinity" or
"-Infinity", which Python's `float()` and JavaScript's `Number()` can read; null would hide that a
run diverged.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from core.folder import staged_file

Record = Mapping[str, float | int | str]

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def encode(record: Record) -> str:
    """Returns one line of JSON, without the line end.

    Args:
        record: Flat record; floats keep full precision.
    """
    return json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False)


def _finite(value: float | int | str) -> float | int | str:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def read_records(path: Path, has_steps: bool = True) -> list[dict[str, object]]:
    """Returns the records of a file in order, without lines torn by a crash.

    Args:
        path: File that `JsonlSink` wrote; a missing file has no records.
        has_steps: True: records have a step, and what has none is left out.
    """
    if not path.exists():
        return []
    with path.open("rb") as lines:
        return [record for line in lines if (record := _decode(line, has_steps)) is not None]


def _decode(line: bytes, has_step: bool = True) -> dict[str, object] | None:
    """Returns the record in a line, or None if the writer was killed halfway through it."""
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    if not line.endswith(b"\n") or not isinstance(record, dict):
        return None
    return record if isinstance(record.get("step"), int) or not has_step else None


def drop_lost_steps(path: Path, first_step: int) -> int:
    """Removes the steps that a resumed run is about to repeat, and lines torn by the crash.

    The file is replaced by one atomic rename, so a second crash here loses nothing.

    Args:
        path: A `.jsonl` file, which may be missing.
        first_step: Last step that the checkpoint holds; 0 starts afresh and drops everything.

    Returns:
        Number of removed lines.
    """
    if not path.exists():
        return 0
    num_dropped = 0
    # A new file replaces the old one in one step, so that a second crash loses nothing.
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
    """Appends records to a file and flushes each line.

    Args:
        path: Path of the file; its folder must exist.
        first_step: Step from which the run resumes; later lines in the file are dropped.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.num_dropped = drop_lost_steps(path, first_step)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, record: Record) -> None:
        """Appends one line and hands it to the operating system."""
        self._file.write(encode(record) + "\n")
        self._file.flush()

    def close(self, exit_status: str) -> None:
        """Closes the file."""
        self._file.close()
