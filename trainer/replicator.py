"""Copies each checkpoint's files to the disk of another machine, whose loss then costs nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from core.errors import SpotforgeError
from core.folder import Manifest, staged_file
from parallel.disks import Disks
from trainer.checkpoint import writer_of
from trainer.finder import fetch
from trainer.storage import CHECKPOINTS, Storage


def num_replicas(setting: str, disks: Disks) -> int:
    """Returns the number of copies to make of each disk's files.

    Args:
        setting: `auto` or a number.
        disks: Disks of the run; with few of them there are few places for copies.
    """
    wanted = 1 if setting == "auto" else int(setting)
    return min(wanted, len(disks.leaders) - 1)


class Replicator:
    """Fetches the files of the disks before this one, in a thread; only on a disk's leader.

    The disks form a ring in the order of their leaders. A checkpoint that waits while an earlier
    one is fetched is dropped when a newer one comes.

    Args:
        storage: Storage of the checkpoints.
        num: Number of disks whose files this one holds as well.
    """

    def __init__(self, storage: Storage, num: int) -> None:
        leaders = storage.disks.leaders
        own = leaders.index(storage.world.rank)
        # A thread must not beat: it would hide that the main thread hangs.
        self._storage = replace(storage, beat=lambda: None)
        self._from = {leaders[own - i] for i in range(1, num + 1)}
        self._changed = threading.Condition()
        self._waiting: _Task | None = None
        self._busy = self._closed = False
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="replicas", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Path, files: Manifest) -> None:
        """Fetches the other disks' files of a committed checkpoint."""
        with self._changed:
            self._waiting = _Task(checkpoint, files)
            self._changed.notify_all()

    def wait(self, beat: Callable[[], None]) -> str | None:
        """Waits until all is fetched; returns the reason if the last checkpoint was not."""
        with self._changed:
            while self._waiting is not None or self._busy:
                self._changed.wait(timeout=1)
                beat()
            return self._error

    def close(self) -> None:
        """Fetches nothing more; a current fetch ends with the process."""
        with self._changed:
            self._closed, self._waiting = True, None
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                task, self._waiting, self._busy = self._waiting, None, True
                assert task is not None
            error = self._replicate(task)
            with self._changed:
                self._busy, self._error = False, error
                self._changed.notify_all()

    def _replicate(self, task: _Task) -> str | None:
        disks = self._storage.disks
        try:
            for file, entry in task.files.items():
                writer = writer_of(file)
                if writer is None or disks.leader_of[writer] not in self._from:
                    continue
                path = f"{task.checkpoint.name}/{file}"
                owner = [disks.leader_of[writer]]
                sources = self._storage.sources(CHECKPOINTS, path, owner, is_stored=False)
                # Into the committed folder: the manifest lists it, and it appears complete.
                with staged_file(task.checkpoint / file) as staging:
                    fetch(file, entry, sources, staging)
        except (SpotforgeError, OSError) as e:
            if not task.checkpoint.exists():  # meanwhile outdated, and removed
                return None
            # Training continues, since the file is on its own disk.
            text = f"{task.checkpoint.name} has no copy on {disks.hosts[disks.rank]}: {e}"
            print(text, file=sys.stderr, flush=True)
            return text
        return None


class _Task(NamedTuple):
    checkpoint: Path
    files: Manifest
