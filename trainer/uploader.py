"""Uploads committed checkpoints without waiting for the store, from one machine or from several.

Where machines have disks of their own, the first rank on each disk is its leader and uploads the
files that are only there. Rank 0 is always one; it chooses what is uploaded next, since leaders
that chose for themselves might never upload the same checkpoint, and commits it once all leaders
have announced that their files are there.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from core import layout
from core.errors import SpotforgeError, SupersededError
from trainer.checkpoint import outdated
from trainer.config import CheckpointConfig
from trainer.remote import RemoteCheckpoints

_AGAIN_S = 30.0
_PATIENCE_S = 900.0
_LEADERS_S = 3600.0  # a link of a machine may be many times slower than that of rank 0
_POLL_S = 0.5


class Tell(Protocol):
    """Records an event (`monitoring/events.py`); safe to call from any thread."""

    def __call__(self, event: str, step: int, **details: float | int | str) -> None: ...


class Leaders:
    """Lets the leaders of several disks work on one checkpoint, through the store of the ranks.

        chosen     "3 step-00001000 7-1c9e...": the third attempt, which is at this checkpoint, and
                   the start that has claimed the object store
        3/8        what rank 8 could not upload in the third attempt; empty if all is there

    Args:
        store: Store of the ranks (`World.store`).
        generation: Start of the run; a store may outlive it.
        others: Leaders other than rank 0.
    """

    def __init__(self, store: dist.Store, generation: int, others: Collection[int] = ()) -> None:
        self._store = dist.PrefixStore(f"uploaded/{generation}", store)
        self._others = others
        self._attempt = 0

    def choose(self, name: str, start: str) -> None:
        """Begins the next attempt; only rank 0 calls it, for the start that it has claimed."""
        self._attempt += 1
        if self._others:
            self._store.set("chosen", f"{self._attempt} {name} {start}")

    def missing(self) -> list[int]:
        """Returns the leaders that have not announced yet what became of the current attempt.

        Raises:
            SpotforgeError: One of them failed.
        """
        missing = []
        for rank in self._others:
            key = f"{self._attempt}/{rank}"
            if not self._store.check([key]):  # `get` would block other threads that use the store
                missing.append(rank)
            elif error := self._store.get(key).decode():
                raise SpotforgeError(f"rank {rank}: {error}")
        return missing

    def chosen(self) -> tuple[int, str, str]:
        """Returns the current attempt, its checkpoint and its start; 0 before the first one."""
        if not self._store.check(["chosen"]):
            return 0, "", ""
        attempt, name, start = self._store.get("chosen").decode().split()
        return int(attempt), name, start

    def announce(self, attempt: int, rank: int, error: str) -> None:
        """Announces to rank 0 what became of this rank's part in an attempt."""
        self._store.set(f"{attempt}/{rank}", error)


@dataclass
class _Upload:
    checkpoint: Path
    files: list[str]
    done: set[str] = field(default_factory=set)  # those that an earlier attempt has uploaded


class Uploader:
    """Copies committed checkpoints to the object store, one at a time, the newest first; on rank 0.

    A checkpoint that arrives during an upload waits. If a newer one arrives meanwhile, the waiting
    one is dropped, since a resume would take the newer one. One that fails is tried again until it
    succeeds or a newer one arrives; training does not depend on it, since it is on the disk.

    Args:
        remote: Object store.
        config: Settings of checkpoints, which say how many are kept.
        tell: Function that records uploads and failures.
        leaders: Leaders whose files are waited for; None where rank 0 sees all files.
        clock: Function that returns a time in seconds.
    """

    def __init__(
        self,
        remote: RemoteCheckpoints,
        config: CheckpointConfig,
        tell: Tell,
        leaders: Leaders | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remote, self._config, self._tell = remote, config, tell
        self._leaders, self._clock = leaders, clock
        self._changed = threading.Condition()
        self._waiting: _Upload | None = None
        self._current: _Upload | None = None
        self._closed = False
        self._error: str | None = None  # of the last attempt
        self._superseded: SupersededError | None = None
        self._failing_since: float | None = None
        self._again_at = 0.0
        self._said: str | None = None  # name of the checkpoint whose failure was said
        self._patience_s: float | None = None  # None while the run goes on
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> set[str]:
        """Names of checkpoints that must stay on disk for now."""
        with self._changed:
            return {u.checkpoint.name for u in (self._waiting, self._current) if u is not None}

    @property
    def superseded(self) -> SupersededError | None:
        """Error that ends the run, if a later start of it has taken over the store."""
        return self._superseded

    def submit(self, checkpoint: Path, files: Iterable[str]) -> None:
        """Uploads a committed checkpoint once the current upload is done.

        Args:
            checkpoint: Folder of the checkpoint.
            files: Files of it that this rank uploads, besides the manifest.
        """
        with self._changed:
            self._waiting = _Upload(checkpoint, sorted(files))
            self._changed.notify_all()

    def wait(self, beat: Callable[[], None], finished: bool) -> str | None:
        """Waits until the newest checkpoint is uploaded.

        Args:
            beat: Function called regularly.
            finished: True goes on trying until 15 minutes after the first failure, since nothing
                will upload the checkpoint later. False tries once more, since the next start will.

        Returns:
            Reason for a failure; None if there was none.

        Raises:
            SupersededError: A later start of the run has taken over.
        """
        with self._changed:
            self._patience_s = _PATIENCE_S if finished else 0.0
            self._again_at = self._clock()
            self._changed.notify_all()
            while (self._waiting or self._current) and self._thread.is_alive():
                self._changed.wait(_POLL_S)
                beat()
            if self._superseded is not None:
                raise self._superseded
            if self._waiting or self._current:
                return self._error or "the thread that uploads has ended"
            return self._error

    def close(self) -> None:
        """Accepts no more uploads; a current one ends with the process."""
        with self._changed:
            self._closed, self._waiting = True, None
            self._changed.notify_all()

    def _run(self) -> None:
        while (upload := self._next()) is not None:
            error: Exception | None = None
            try:
                self._upload(upload)  # outside of the lock: `submit` never waits for the network
            except SupersededError as e:
                with self._changed:
                    self._superseded, self._waiting, self._current = e, None, None
                    self._changed.notify_all()
                return
            except (SpotforgeError, OSError, ValueError, dist.DistError) as e:
                error = e
            with self._changed:
                if error is None:
                    self._current = self._error = self._failing_since = None
                elif not self._closed:
                    self._failed(upload, error)
                self._changed.notify_all()

    def _next(self) -> _Upload | None:
        """Returns the next checkpoint to try, waiting for one; None at the end."""
        with self._changed:
            while not self._closed:
                if self._waiting is not None:
                    self._current, self._waiting = self._waiting, None
                    return self._current
                if self._current is not None and self._clock() >= self._again_at:
                    return self._current
                self._changed.wait(None if self._current is None else _POLL_S)
            return None

    def _upload(self, upload: _Upload) -> None:
        began = time.perf_counter()
        checkpoint = upload.checkpoint
        if self._leaders is not None:
            # Asked first, so that a start that was superseded has no other machine upload.
            self._remote.check_newest(checkpoint)
            self._leaders.choose(checkpoint.name, self._remote.start)
        self._remote.upload(checkpoint, upload.files, upload.done)
        if self._leaders is not None:
            self._await(self._leaders)
        upload.done.clear()  # if the commit finds one missing after all
        self._remote.commit(checkpoint)
        self._record("upload", checkpoint, upload_s=time.perf_counter() - began)
        try:
            self._remove_outdated(checkpoint.name)
        except SupersededError:
            raise
        except SpotforgeError as e:  # the next upload removes them
            _say(f"{checkpoint.name} was uploaded, but {e}")

    def _remove_outdated(self, newest: str) -> None:
        # As on disk, newer checkpoints must not displace this one.
        names = [n for n in self._remote.names() if n <= newest]
        for name in outdated(names, self._config.keep_last, self._config.keep_every):
            self._remote.delete(name)
        self._remote.remove_incomplete()  # left by killed uploads

    def _await(self, leaders: Leaders) -> None:
        deadline = self._clock() + _LEADERS_S
        while missing := leaders.missing():
            if self._clock() >= deadline:
                raise SpotforgeError(
                    f"rank {missing[0]} has not uploaded its files within "
                    f"{_LEADERS_S / 60:.0f} minutes"
                )
            with self._changed:
                if self._closed:
                    raise SpotforgeError("the run has ended")
                self._changed.wait(_POLL_S)

    def _failed(self, upload: _Upload, error: Exception) -> None:
        """Decides whether a failed upload is tried again, and says so once for each checkpoint."""
        now, name = self._clock(), upload.checkpoint.name
        if self._failing_since is None:
            self._failing_since = now
        self._error, self._again_at = str(error), now + _AGAIN_S
        again = f"it is tried again every {_AGAIN_S:.0f} s"
        # What this disk lacks, no other attempt will find.
        if isinstance(error, OSError | ValueError):
            self._current, again = None, "it cannot be read"
        elif self._patience_s is not None:
            if now - self._failing_since >= self._patience_s:
                self._current, again = None, "it is not tried again"
            else:
                again += f", for up to {self._patience_s / 60:.0f} minutes"
        if self._said != f"{name}, {again}":
            self._said = f"{name}, {again}"
            _say(f"{name} was not uploaded: {error}; {again}")
            self._record("upload_failed", upload.checkpoint, error=str(error))

    def _record(self, event: str, checkpoint: Path, **details: float | str) -> None:
        """Records an event; one that cannot be written, e.g. on a full disk, ends no upload."""
        try:
            self._tell(event, _step(checkpoint), **details)
        except OSError as e:
            _say(f"the event {event} of {checkpoint.name} was not recorded: {e}")


class LeaderUploader:
    """Uploads the files of a disk that rank 0 does not see, whenever rank 0 chooses a checkpoint.

    Args:
        remote: Object store.
        leaders: Leaders of the run.
        rank: Number of this rank, which is the leader of its disk.
    """

    def __init__(self, remote: RemoteCheckpoints, leaders: Leaders, rank: int) -> None:
        self._remote, self._leaders, self._rank = remote, leaders, rank
        self._changed = threading.Condition()
        self._submitted: list[_Upload] = []  # oldest first; rank 0 may still choose each
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> set[str]:
        """Names of checkpoints that must stay on disk for now."""
        with self._changed:
            return {upload.checkpoint.name for upload in self._submitted}

    def submit(self, checkpoint: Path, files: Iterable[str]) -> None:
        """Uploads a committed checkpoint if rank 0 chooses it; see `Uploader.submit`."""
        with self._changed:
            others = [u for u in self._submitted if u.checkpoint != checkpoint]
            # All that is kept here stays on the disk, which would fill during a long upload. Rank 0
            # is at the first, and drops what arrives meanwhile but for the newest. That one may be
            # the last but one here, since each arrives here and there at different moments.
            others = [*others[:1], *others[1:][-1:]]
            self._submitted = [*others, _Upload(checkpoint, sorted(files))]
            self._changed.notify_all()

    def close(self) -> None:
        """Uploads nothing more; a current upload ends with the process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        done = 0
        try:
            while not self._closed:
                attempt, name, start = self._leaders.chosen()
                if attempt > done and (upload := self._take(name)) is not None:
                    self._remote.act_for(start)
                    self._leaders.announce(attempt, self._rank, self._upload(upload))
                    done = attempt
                elif attempt > done and self._is_past(name):
                    self._leaders.announce(attempt, self._rank, f"{name} is not here any more")
                    done = attempt
                else:
                    with self._changed:
                        self._changed.wait(_POLL_S)
        except dist.DistError:
            pass  # rank 0 has ended, and the store with it

    def _take(self, name: str) -> _Upload | None:
        """Returns a submitted checkpoint, and forgets those before it, which come no more.

        Rank 0 may choose it a moment before it is submitted here.
        """
        with self._changed:
            for i, upload in enumerate(self._submitted):
                if upload.checkpoint.name == name:
                    self._submitted = self._submitted[i:]
                    return upload
            return None

    def _is_past(self, name: str) -> bool:
        """Returns whether a newer checkpoint was submitted, so that this one comes no more."""
        with self._changed:
            return any(upload.checkpoint.name > name for upload in self._submitted)

    def _upload(self, upload: _Upload) -> str:
        """Returns what could not be uploaded; empty if all is there."""
        try:
            self._remote.upload(upload.checkpoint, upload.files, upload.done)
        except (SpotforgeError, OSError, ValueError) as e:
            return str(e) or type(e).__name__
        upload.done.clear()
        return ""


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(layout.STEP))


def _say(text: str) -> None:
    """Prints a line, unless stderr cannot be written either, e.g. a file on a full disk."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
