"""Saves checkpoints without waiting for disks, and uploads them without waiting for the store.

save()     staged: copied to host memory; training continues
           written: by every rank to its own disk, in the background, over a process group of its
           own; one rank of each disk, its leader, adds what is not tensors
           replicated: to the disk of another machine, where machines have disks of their own
           committed: by one rename on each disk, once all of this is done; then older checkpoints
           that need not stay are removed
           uploaded: in a third thread (uploader.py)
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from core import layout
from core.errors import ConfigError, OwnDiskError, SpotforgeError
from core.folder import (
    Manifest,
    commit,
    manifest_of,
    remove,
    remove_uncommitted,
    staging_of,
    write_file,
)
from trainer.checkpoint import (
    Located,
    TrainerState,
    committed,
    fetched_folder,
    outdated,
    step_name,
    writer_of,
)
from trainer.config import CheckpointConfig
from trainer.distant_file import DistantFile, fetch
from trainer.logs import save_logs
from trainer.storage import CHECKPOINTS, Generation, Storage
from trainer.uploader import Leaders, LeaderUploader, Tell, Uploader

T = TypeVar("T")


class Checkpointer:
    """Saves in the background, and reports failures to the loop.

    Args:
        config: Settings of checkpoints.
        storage: Storage of the checkpoints.
        generation: Number of this start of the run.
        save_assets: Function that writes what an export needs beside tensors (config, tokenizer).
        tell: Function that records committed and uploaded checkpoints, on rank 0.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        storage: Storage,
        generation: Generation,
        save_assets: Callable[[Path], None],
        tell: Tell,
    ) -> None:
        self._config, self._storage, self._generation = config, storage, generation
        self._folder, self._world, self._disks = storage.folder, storage.world, storage.disks
        self._save_assets, self._tell = save_assets, tell
        self._stager: DefaultStager | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._saved: tuple[Path, Manifest] | None = None
        self._uploader: Uploader | None = None  # on rank 0
        self._leader_uploader: LeaderUploader | None = None  # on leaders of other disks
        if self._disks.is_leader:
            remove_uncommitted(self._folder)  # left by a run that was killed while saving
            if storage.remote is not None:
                others = self._disks.leaders[1:]
                leaders = Leaders(self._world.store, generation.number, others)
                if self._world.rank == 0:
                    self._uploader = Uploader(storage.remote, config, tell, leaders)
                else:
                    self._leader_uploader = LeaderUploader(
                        storage.remote, leaders, self._world.rank
                    )

    def save(
        self,
        tensors_of: Callable[[], dict[str, Tensor]],
        state: TrainerState,
        record: dict[str, Any] | None = None,
    ) -> float:
        """Stages a copy and writes it in the background; collective.

        Args:
            tensors_of: Function that returns this rank's share of the canonical state.
            state: State other than tensors.
            record: Metrics of this step; None if they are not logged.

        Returns:
            Time that training was blocked, in seconds.

        Raises:
            ConfigError: The disk is too small or an earlier save failed; raised on every rank.
        """
        began = time.perf_counter()
        self.wait()  # one save at a time: the stager's buffers are still in use by the last one
        tensors = tensors_of()
        self._check_space(tensors)
        # Kept for all saves, since its buffers, pinned on a GPU's host, are slow to allocate.
        if self._stager is None:
            self._stager = _stager(self._world.device)
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)  # a future only with asynchronous staging
        blocking_s = time.perf_counter() - began
        self._pending = self._writer.submit(self._write, staged, state, record, blocking_s)
        if not self._config.asynchronous:
            self.wait()
        return time.perf_counter() - began

    @property
    def for_rollback(self) -> Storage:
        """Storage from which a run reads that goes back to an earlier checkpoint.

        A disk that all ranks share has all of them; the object store may not answer. Disks of
        their own may lack what this start itself has read from the store.
        """
        if not self._disks.is_shared:
            return self._storage
        return dataclasses.replace(self._storage, remote=None)

    @property
    def failed(self) -> bool:
        """True if saves or uploads have failed for good; `wait()` raises the error on all ranks."""
        if self._uploader is not None and self._uploader.superseded is not None:
            return True
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Waits until the current save is committed; collective.

        Raises:
            ConfigError: The checkpoint could not be written; raised on every rank.
            SupersededError: A newer start of the run has taken over; raised on every rank.
        """
        pending, self._pending = self._pending, None
        while pending is not None and wait_for([pending], timeout=1).not_done:
            self._storage.beat()
        with self._world.together():
            if self._uploader is not None and self._uploader.superseded is not None:
                raise self._uploader.superseded
            if pending is not None:
                try:
                    pending.result()
                except OSError as e:  # after the commit, on this rank alone
                    raise self._disk_error(e, self._world.rank) from e

    def wait_for_uploads(self, finished: bool) -> str | None:
        """Waits until the newest checkpoint is in the object store; on rank 0, not collective.

        Args:
            finished: True where the run goes on no more; see `Uploader.wait`.

        Returns:
            Reason for a failure; None if there was none, or nothing is uploaded.
        """
        return None if self._uploader is None else self._uploader.wait(self._storage.beat, finished)

    def last_saved(self) -> Located | None:
        """Returns the newest checkpoint that this start saved; None if it saved none."""
        if self._saved is None:
            return None
        checkpoint, files = self._saved
        fetched = fetched_folder(self._folder, checkpoint.name)
        elsewhere: dict[str, DistantFile] = {}
        for file, entry in files.items():
            writer = writer_of(file)
            if writer is None or (checkpoint / file).exists():
                continue
            owner, path = [self._disks.leader_of[writer]], f"{checkpoint.name}/{file}"
            sources = self._storage.sources(CHECKPOINTS, path, owner, is_stored=False)
            elsewhere[file] = DistantFile(file, entry, sources, fetched / file)
        return Located(checkpoint, elsewhere, fetched)

    def close(self) -> None:
        """Ends the background threads; current copies are given up."""
        # Its thread uses a process group that does not outlive the run.
        self._writer.shutdown(wait=True)
        for uploader in (self._uploader, self._leader_uploader):
            if uploader is not None:
                uploader.close()
        if self._stager is not None:
            self._stager.close()

    def _write(
        self,
        tensors: dict[str, Tensor],
        state: TrainerState,
        record: dict[str, Any] | None,
        blocking_s: float,
    ) -> None:
        """Writes and commits a checkpoint in the background thread of every rank."""
        began = time.perf_counter()
        final = self._folder / step_name(state.step)
        staging = staging_of(final)
        try:
            files = self._stage(staging, tensors, state, record)
            self._replicate(staging, files)
            self._commit(staging, final, files)
            self._saved = final, files
        except BaseException:
            if self._disks.is_leader:
                remove(staging)
            raise
        self._tell(
            "checkpoint",
            state.step,
            blocking_s=blocking_s,
            write_s=time.perf_counter() - began,
            size_bytes=sum(file["size_bytes"] for file in files.values()),
        )
        if self._disks.is_leader:
            self._remove_outdated(final.name)
            self._upload(final, files)

    def _stage(
        self,
        staging: Path,
        tensors: dict[str, Tensor],
        state: TrainerState,
        record: dict[str, Any] | None,
    ) -> Manifest:
        """Writes the files of all ranks, each to its own disk; collective.

        Returns:
            Entries of the files of all ranks.

        Raises:
            ConfigError: A rank could not write its files; raised on every rank.
        """
        rank, group, disks = self._world.rank, self._world.saving, self._disks
        may_move = not disks.is_shared or self._storage.remote is not None
        mine: Manifest = {}
        error: BaseException | None = None
        try:
            dcp.save(tensors, checkpoint_id=staging, process_group=group)
            if rank == 0:
                self._save_assets(staging / layout.ASSETS)
                described = json.dumps(dataclasses.asdict(state), indent=1)
                write_file(staging / layout.TRAINER_STATE, described)
                if may_move:
                    logs = staging / layout.LOGS
                    save_logs(self._folder.parent, logs, state.step, record)
            # Each rank hashes the files that it wrote; rank 0 also hashes the small ones.
            mine = manifest_of(
                staging, lambda path: (writer_of(path.name) or 0) == rank, blocks=may_move
            )
        except (Exception, CheckpointException) as e:  # the latter does not derive from Exception
            error = e
        return {k: v for part in self._agree(mine, error) for k, v in part.items()}

    def _replicate(self, staging: Path, files: Manifest) -> None:
        """Copies files of other disks to this one; collective.

        Every disk gets the small files, which rank 0 has written, and copies of other disks'
        tensors. It happens before the commit, so that what is committed outlives any machine.

        Raises:
            SpotforgeError: A file could not be fetched or written; raised on every rank.
        """
        disks, copied = self._disks, self._copied_disks()
        if disks.is_shared:
            return
        # This thread must not beat: it would hide that the main thread hangs.
        storage = dataclasses.replace(self._storage, beat=lambda: None)
        error: BaseException | None = None
        try:
            for file, entry in files.items() if disks.is_leader else ():
                writer = writer_of(file)
                owner = 0 if writer is None else disks.leader_of[writer]
                if owner == disks.leader or not (writer is None or owner in copied):
                    continue
                sources = storage.sources(CHECKPOINTS, f"{staging.name}/{file}", [owner], False)
                (staging / file).parent.mkdir(exist_ok=True)
                fetch(file, entry, sources, staging / file)
        except Exception as e:
            error = e
        self._agree(None, error)

    def _copied_disks(self) -> set[int]:
        """Returns the leaders of the disks whose files this one holds, too.

        The disks form a ring in the order of their leaders; each holds those before it.
        """
        leaders = self._disks.leaders
        own = leaders.index(self._disks.leader)
        num = self._storage.num_replicas(self._config.replicas)
        return {leaders[own - i] for i in range(1, num + 1)}

    def _commit(self, staging: Path, final: Path, files: Manifest) -> None:
        """Commits the checkpoint on every disk; collective.

        Raises:
            SupersededError: A newer start of the run has taken over.
            ConfigError: A disk could not be written; raised on every rank.
        """
        error: BaseException | None = None
        try:
            if self._disks.is_leader:
                self._generation.check()
                manifest = {"generation": self._generation.number, "files": files}
                write_file(staging / layout.MANIFEST, json.dumps(manifest, indent=1))
                commit(staging, final, replace=True)  # resume skipped a damaged one of that name
                write_file(self._folder / layout.LATEST, final.name + "\n")
        except Exception as e:
            error = e
        # No rank may see its save as done, nor remove an older checkpoint, before all disks have
        # their part.
        self._agree(None, error)

    def _agree(self, value: T, error: BaseException | None) -> list[T]:
        """Returns the values of all ranks, or raises if any of them has an error; collective.

        Every rank takes part, whatever happened to it, so that none waits for ever.
        """
        rank, failure = self._world.rank, None
        explained = None if error is None else self._explained(error)
        if error is not None:
            failure = explained or SpotforgeError(f"rank {rank} could not save: {error!r}")
        told: list[tuple[T, SpotforgeError | None]] = [(value, failure)] * self._world.world_size
        dist.all_gather_object(told, (value, failure), group=self._world.saving)
        if error is not None and explained is None:
            raise error  # a bug, of which the traceback is wanted
        for _, found in told:
            if found is not None:
                raise found from error
        return [value for value, _ in told]

    def _explained(self, error: BaseException) -> SpotforgeError | None:
        """Returns an error of a save in the user's words; None for one that is a bug."""
        if isinstance(error, SpotforgeError):
            return error
        failures: dict[int, Any] = getattr(error, "failures", {})  # dcp wraps those of all ranks
        for rank, (inner, _) in sorted(failures.items()):
            if (cause := _os_error(inner)) is not None:
                return self._disk_error(cause, rank)
        cause = _os_error(error)
        return None if cause is None else self._disk_error(cause, self._world.rank)

    def _remove_outdated(self, newest: str) -> None:
        """Removes older checkpoints from this disk, which need not stay."""
        # Newer checkpoints are damaged or abandoned by the user; they must not displace this one.
        names = [p.name for p in committed(self._folder) if p.name <= newest]
        uploader = self._uploader or self._leader_uploader
        being_copied = set() if uploader is None else uploader.busy
        for name in outdated(names, self._config.keep_last, self._config.keep_every):
            if name not in being_copied:
                trash = staging_of(self._folder / name)
                # From the rename on it is not committed, even if the deletion is interrupted.
                (self._folder / name).rename(trash)
                shutil.rmtree(trash)

    def _upload(self, checkpoint: Path, files: Manifest) -> None:
        """Has the files of this disk uploaded."""
        uploader = self._uploader or self._leader_uploader
        if uploader is not None:
            own = [file for file in files if self._uploads(file)]
            uploader.submit(checkpoint, own)

    def _uploads(self, file: str) -> bool:
        """Returns whether this rank uploads a file: one of its disk, or what is on all of them."""
        writer = writer_of(file)
        return self._disks.leader == self._disks.leader_of[0 if writer is None else writer]

    def _check_space(self, tensors: dict[str, Tensor]) -> None:
        """Refuses a save before anything is written if a disk is plainly too small."""
        mine = sum(_local(t).numel() * _local(t).element_size() for t in tensors.values())
        needs = self._world.gather(mine)
        with self._world.together():
            if self._disks.is_leader:
                held = {self._disks.leader, *self._copied_disks()}
                need = sum(
                    needs[r] for r, leader in enumerate(self._disks.leader_of) if leader in held
                )
                self._folder.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self._folder).free
                if free < need:
                    text = f"needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
                    raise self._disk_error(OSError(errno.ENOSPC, text), self._world.rank)

    def _disk_error(self, cause: OSError, rank: int) -> ConfigError:
        good = [path for path in committed(self._folder) if path.exists()]
        kept = f"{good[0].name} is complete and stays" if good else "there is no earlier one"
        if not self._disks.is_shared:
            where = f"could not be written on {self._disks.hosts[rank]}"
            return OwnDiskError(
                "run.dir",
                self._folder.parent,
                f"the checkpoint {where}: {cause.strerror}; {kept}",
                "free space or lower checkpoint.keep_last, then start that machine again",
                rank,
            )
        return ConfigError(
            "run.dir",
            self._folder.parent,
            f"the checkpoint could not be written: {cause.strerror}; {kept}",
            "free space or lower checkpoint.keep_last, then run the same command again",
        )


def _stager(device: torch.device) -> DefaultStager:
    cuda = device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            # From pinned memory on, a copy from the GPU needs no intermediate buffer.
            use_pinned_memory=cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=cuda,
        )
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _os_error(error: BaseException) -> OSError | None:
    """Returns the OSError behind an error, or None."""
    if isinstance(error, OSError):
        return error
    cause = error.__cause__ or error.__context__
    return _os_error(cause) if cause is not None else None
