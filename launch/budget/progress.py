"""The progress of a run, read from the files that the trainer writes to its directory."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from core import layout
from monitoring.events import read_events

_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Progress:
    """The progress of a run; zeros if nothing is known.

    Attributes:
        step: Last logged step.
        tokens: Tokens trained on by that step.
        total_tokens: Tokens of the finished run; None if only a time limit ends it.
    """

    step: int = 0
    tokens: float = 0.0
    total_tokens: float | None = None


def read_progress(run_dir: Path | None) -> Progress:
    """Returns the progress of a run; reads only the end of `metrics.jsonl`.

    Args:
        run_dir: Run directory, which need not exist yet; None: no run is known.

    Raises:
        OSError: The folder cannot be read, e.g. since a mounted bucket is unreachable.
    """
    last = _last_record(run_dir / layout.METRICS) if run_dir is not None else {}
    step, tokens = last.get("step"), last.get("num_tokens")
    if run_dir is None or not isinstance(step, int) or not isinstance(tokens, int | float):
        return Progress()
    total_steps = _read_json(run_dir / layout.STATUS).get("total_steps")
    if not isinstance(total_steps, int) or step < 1:
        return Progress(step, float(tokens))
    # The status has no total of tokens; every step so far had the same number on average.
    return Progress(step, float(tokens), total_steps * tokens / step)


def saved_step(run_dir: Path | None) -> int | None:
    """Returns the step of the newest committed checkpoint; None without one.

    Raises:
        OSError: See `read_progress`.
    """
    # The pattern leaves out checkpoints that are being written: they are `.staging-step-*`.
    found = run_dir.glob(f"{layout.CHECKPOINTS}/{layout.STEP}*") if run_dir else ()
    digits = [path.name.removeprefix(layout.STEP) for path in found]
    steps = [int(number) for number in digits if number.isdecimal()]
    return max(steps, default=None)


def longest_save_s(run_dir: Path | None) -> float:
    """Returns the seconds that the longest save has taken, including its upload if there is one.

    Raises:
        OSError: See `read_progress`.
    """
    events = read_events(run_dir) if run_dir is not None else []
    saves = [_seconds(e, "blocking_s") + _seconds(e, "write_s") for e in events]
    uploads = [_seconds(e, "upload_s") for e in events]
    return max(saves, default=0.0) + max(uploads, default=0.0)


def _seconds(event: dict[str, object], key: str) -> float:
    value = event.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def _last_record(path: Path) -> dict[str, object]:
    """Returns the record in the last complete line; empty if there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # torn, or still being written
            continue
        if isinstance(record, dict):
            return record
    return {}


def _read_json(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError:  # a machine that was lost during a write may leave an empty file
        return {}
    return content if isinstance(content, dict) else {}
