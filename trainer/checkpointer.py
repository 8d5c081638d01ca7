"""Saves checkpoints without waiting for the disk.

save()     staged: copied to host memory; training continues
           written: by every rank, in the background, over a process group of its own
           committed: by one rename; older checkpoints that need not stay are removed
           uploaded: in a third thread (uploader.py)
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from core import layout
from core.errors import ConfigError
from core.folder import (
    Manifest,
    commit,
    manifest_of,
    remove,
    remove_uncommitted,
    staging_of,
    write_file,
)
from parallel.world import World
from trainer.checkpoint import TrainerState, committed, outdated, step_name
from trainer.config import CheckpointConfig
from trainer.remote import RemoteCheckpoints
from trainer.uploader import Tell, Uploader


class Checkpointer:
    """Saves in the background, and reports failures to the loop.

    Args:
        config: Settings of checkpoints.
        folder: Folder of the checkpoints.
        world: Ranks of the run.
        save_assets: Function that writes what an export needs beside tensors (config, tokenizer).
        tell: Function that records committed and uploaded checkpoints, on rank 0.
        remote: Object store to copy them to, or None; only rank 0 needs it.
        beat: Function called regularly while the main thread waits.
        generation: Start of the run, as `remote` was claimed for it; 0 without a store.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        world: World,
        save_assets: Callable[[Path], None],
        tell: Tell,
        remote: RemoteCheckpoints | None = None,
        beat: Callable[[], None] = lambda: None,
        generation: int = 0,
    ) -> None:
        self._config, self._folder, self._world = config, folder, world
        self._generation = generation
        self._save_assets, self._tell, self._beat = save_assets, tell, beat
        self._stager: DefaultStager | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._uploader: Uploader | None = None
        if world.rank == 0:
            remove_uncommitted(folder)  # left by a run that was killed while saving
            if remote is not None:
                self._uploader = Uploader(remote, config, tell)

    def save(self, tensors_of: Callable[[], dict[str, Tensor]], state: TrainerState) -> float:
        """Stages a copy and writes it in the background; collective.

        Args:
            tensors_of: Function that returns this rank's share of the canonical state.
            state: State other than tensors.

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
        self._pending = self._writer.submit(self._write, staged, state, blocking_s)
        if not self._config.asynchronous:
            self.wait()
        return time.perf_counter() - began

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
            ConfigError: The checkpoint could not be written, or a later start of the run has taken
                over; raised on every rank.
        """
        pending, self._pending = self._pending, None
        while pending is not None and wait_for([pending], timeout=1).not_done:
            self._beat()
        with self._world.together():
            if self._uploader is not None and self._uploader.superseded is not None:
                raise self._uploader.superseded
            try:
                if pending is not None:
                    pending.result()
            except (Exception, CheckpointException) as e:
                cause = _os_error(e)
                if cause is None:
                    raise
                raise self._disk_error(cause) from e

    def wait_for_uploads(self, finished: bool) -> str | None:
        """Waits until the newest checkpoint is in the object store; on rank 0, not collective.

        Args:
            finished: True where the run goes on no more; see `Uploader.wait`.

        Returns:
            Reason for a failure; None if there was none, or nothing is uploaded.
        """
        return None if self._uploader is None else self._uploader.wait(self._beat, finished)

    def close(self) -> None:
        """Ends the background threads; a current upload is given up."""
        # Its thread uses a process group that does not outlive the run.
        self._writer.shutdown(wait=True)
        if self._uploader is not None:
            self._uploader.close()
        if self._stager is not None:
            self._stager.close()

    def _write(self, tensors: dict[str, Tensor], state: TrainerState, blocking_s: float) -> None:
        """Writes and commits a checkpoint in the background thread of every rank."""
        began = time.perf_counter()
        name = step_name(state.step)
        final = self._folder / name
        staging = staging_of(final)
        group, rank = self._world.saving, self._world.rank
        error: BaseException | None = None
        mine: Manifest | None = None
        try:
            dcp.save(tensors, checkpoint_id=staging, process_group=group)
            if rank == 0:
                self._save_assets(staging / layout.ASSETS)
                described = json.dumps(dataclasses.asdict(state), indent=1)
                write_file(staging / layout.TRAINER_STATE, described)
            # Each rank hashes the files that it wrote; rank 0 also hashes the assets.
            mine = manifest_of(staging, lambda path: _writer_of(path) == rank)
        except (Exception, CheckpointException) as e:  # the latter does not derive from Exception
            error = e
        # Every rank takes part in this collective, even after an error, so that none waits for
        # ever.
        digests: list[Manifest | None] = [None] * self._world.world_size
        dist.all_gather_object(digests, mine, group=group)
        try:
            if error is None and None in digests:
                raise OSError(errno.EIO, "another rank could not write its part")
            if error is not None:
                raise error
            if rank == 0:
                files = {k: v for part in digests if part for k, v in part.items()}
                manifest = {"generation": self._generation, "files": files}
                write_file(staging / layout.MANIFEST, json.dumps(manifest, indent=1))
                self._commit(staging, final)
                self._tell(
                    "checkpoint",
                    state.step,
                    blocking_s=blocking_s,
                    write_s=time.perf_counter() - began,
                    size_bytes=sum(file["size_bytes"] for file in files.values()),
                )
                if self._uploader is not None:
                    self._uploader.submit(final, files)
        except BaseException:
            if rank == 0:
                remove(staging)
            raise
        finally:
            dist.barrier(group=group)  # no rank may see its save as done before the commit

    def _commit(self, staging: Path, final: Path) -> None:
        commit(staging, final, replace=True)  # a damaged one of that name was skipped by resume
        write_file(self._folder / layout.LATEST, final.name + "\n")
        # Newer checkpoints are damaged or abandoned by the user; they must not displace this one.
        names = [p.name for p in committed(self._folder) if p.name <= final.name]
        being_uploaded = self._uploader.busy if self._uploader is not None else set()
        for name in outdated(names, self._config.keep_last, self._config.keep_every):
            if name not in being_uploaded:
                trash = staging_of(self._folder / name)
                # From the rename on it is not committed, even if the deletion is interrupted.
                (self._folder / name).rename(trash)
                shutil.rmtree(trash)

    def _check_space(self, tensors: dict[str, Tensor]) -> None:
        """Refuses a save before anything is written if the disk is plainly too small."""
        mine = sum(_local(t).numel() * _local(t).element_size() for t in tensors.values())
        need = torch.tensor(mine, dtype=torch.float64)
        # All ranks write into the same folder, so the sum of their shares must fit.
        dist.all_reduce(need, group=self._world.control)
        with self._world.together():
            if self._world.rank == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self._folder).free
                if free < need.item():
                    raise self._disk_error(
                        OSError(
                            errno.ENOSPC,
                            f"needs {need.item() / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                        )
                    )

    def _disk_error(self, cause: OSError) -> ConfigError:
        good = committed(self._folder)
        kept = f"{good[0].name} is complete and stays" if good else "there is no earlier one"
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


def _writer_of(path: Path) -> int:
    """Returns the rank that hashes a file of a checkpoint."""
    found = re.match(r"__(\d+)_", path.name)  # dcp puts the rank into names of files
    return int(found[1]) if found else 0


def _os_error(error: BaseException) -> OSError | None:
    """Returns the OSError behind a failed save, or None (dcp wraps the errors of all ranks)."""
    if isinstance(error, OSError):
        return error
    for inner, _ in getattr(error, "failures", {}).values():
        found = _os_error(inner)
        if found is not None:
            return found
    cause = error.__cause__ or error.__context__
    return _os_error(cause) if cause is not None else None
