"""Keeps what a run has logged in its checkpoints, so that it goes on with it on another machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from core import layout
from core.folder import append_line, write_file
from monitoring.jsonl import read_records

_GROWING = (layout.METRICS, layout.EVENTS, layout.SAMPLES)
_NAMES = (*_GROWING, layout.DATA, layout.ENVIRONMENT)
_LAST = "last_metrics.json"  # of the step of the checkpoint, which may be logged only later


def save_logs(run_dir: Path, folder: Path, step: int, record: dict[str, Any] | None) -> None:
    """Copies what was logged in a run directory to a folder of a checkpoint.

    Args:
        run_dir: Run directory.
        folder: Folder to create.
        step: Step of the checkpoint. Metrics and samples of later steps, which may be logged while
            it is written, are not copied: a resume trains these steps again.
        record: Metrics of the step of the checkpoint; None if that step is not logged.
    """
    folder.mkdir()
    for name in _NAMES:
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, folder / name)
    for path in (folder / layout.METRICS, folder / layout.SAMPLES):
        if path.exists():
            path.write_bytes(_up_to(step, path.read_bytes()))
    if record is not None:
        (folder / _LAST).write_text(json.dumps(record))


def _up_to(step: int, content: bytes) -> bytes:
    """Returns lines with a step each, without those of later steps, and without half a line."""
    lines = content.splitlines(keepends=True)
    while lines and not (lines[-1].endswith(b"\n") and json.loads(lines[-1])["step"] <= step):
        lines.pop()
    return b"".join(lines)


def restore_logs(folder: Path, run_dir: Path) -> None:
    """Copies what a checkpoint holds back to a run directory that has not logged it itself.

    A machine on which the run has gone on since the checkpoint has more lines, and keeps them. One
    that was away in the meantime has other lines, or fewer; they are replaced.

    Args:
        folder: Folder of the checkpoint; missing if it was saved where a run cannot move.
        run_dir: Run directory.
    """
    for name in _NAMES:
        if not (folder / name).exists():
            continue
        stored = (folder / name).read_bytes()
        if name in _GROWING:
            stored = stored[: stored.rfind(b"\n") + 1]  # it was copied while it grew
        own = (run_dir / name).read_bytes() if (run_dir / name).exists() else b""
        if not own or (name in _GROWING and not own.startswith(stored)):
            write_file(run_dir / name, stored)
    if (folder / _LAST).exists():
        record = json.loads((folder / _LAST).read_text())
        metrics = run_dir / layout.METRICS
        if record["step"] not in {logged["step"] for logged in read_records(metrics)}:
            if metrics.exists() and not metrics.read_bytes().endswith(b"\n"):
                append_line(metrics, "")  # ends a line that a kill has torn
            append_line(metrics, json.dumps(record))
