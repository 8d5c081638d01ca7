"""Keeps what a run has logged in its checkpoints, so that it goes on with it on another machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from core import layout
from core.folder import write_file

# The first three grow, and are read as far as their lines are whole.
_GROWING = (layout.METRICS, layout.EVENTS, layout.SAMPLES)
_NAMES = (*_GROWING, layout.DATA, layout.ENVIRONMENT)


def save_logs(run_dir: Path, folder: Path) -> None:
    """Copies what was logged in a run directory to a folder of a checkpoint."""
    folder.mkdir(exist_ok=True)
    for name in _NAMES:
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, folder / name)


def restore_logs(folder: Path, run_dir: Path) -> None:
    """Copies what a checkpoint holds back to a run directory that has not logged it itself.

    A machine on which the run has gone on since the checkpoint has more lines, and keeps them. One
    that was away in the meantime has other lines, or fewer; they are replaced.
    """
    for name in _NAMES:
        if not (folder / name).exists():  # saved where the run cannot move
            continue
        stored = (folder / name).read_bytes()
        stored = stored[: stored.rfind(b"\n") + 1] if name in _GROWING else stored
        own = (run_dir / name).read_bytes() if (run_dir / name).exists() else b""
        if name in _GROWING and not own.startswith(stored) or not own:
            write_file(run_dir / name, stored)
