"""Checkpoints: staged, written by every rank, listed with digests, committed by one rename.

checkpoints/
  .staging-step-00001000/   being written; never read
  step-00001000/            committed
    __0_0.distcp ...        tensors by canonical name (torch.distributed.checkpoint)
    .metadata               where each tensor lies
    huggingface/            config and tokenizer, so that a checkpoint can be exported alone
    trainer.json            step, samples, tokens, digests, the resolved config
    manifest.json           every file above with its size and sha256
  LATEST                    name of the newest, for people and scripts; resume looks for itself
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from monitoring.errors import ConfigError, DamagedError
from parallel.world import World
from trainer.config import CheckpointConfig

_MANIFEST = "manifest.json"
_TRAINER = "trainer.json"
_STAGING = ".staging-"
_LATEST = "LATEST"
ASSETS = "huggingface"


@dataclass(frozen=True)
class TrainerState:
    """All of a run that is not a tensor; the same on every rank and at every world size.

    Attributes:
        step: Completed optimizer steps.
        num_samples: Samples consumed: the cursor into the endless, seeded order of samples.
        num_tokens: Tokens consumed.
        elapsed_s: Seconds trained, over all starts.
        data_digest: Of the prepared data and its mixture.
        tokenizer_fingerprint: Of the tokenizer.
        config: Resolved settings of the run.
    """

    step: int
    num_samples: int
    num_tokens: int
    elapsed_s: float
    data_digest: str
    tokenizer_fingerprint: str
    config: dict[str, Any]


class Checkpointer:
    """Saves in the background, and lets the loop know when that failed.

    Args:
        folder: Where checkpoints go.
        save_assets: Writes what an export needs beside the tensors (config, tokenizer) to a folder.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        world: World,
        save_assets: Callable[[Path], None],
    ) -> None:
        self._config, self._folder, self._world = config, folder, world
        self._save_assets = save_assets
        self._stager: DefaultStager | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, tensors: dict[str, Tensor], state: TrainerState) -> float:
        """Stages a copy and writes it in the background; collective.

        Returns:
            Seconds that training was blocked.

        Raises:
            ConfigError: On every rank, if the disk has no room for it or an earlier save failed.
        """
        begin = time.perf_counter()
        self.wait()
        self._check_space(tensors)
        if self._stager is None:
            self._stager = _stager(self._world.device)
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)  # a future only with asynchronous staging
        self._pending = self._writer.submit(self._write, staged, state)
        if not self._config.asynchronous:
            self.wait()
        return time.perf_counter() - begin

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed on this rank; `wait()` raises it on all."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Waits until the save under way is committed; collective.

        Raises:
            ConfigError: On every rank, if it could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._world.together():
            try:
                pending.result()
            except (Exception, CheckpointException) as e:
                cause = _os_error(e)
                if cause is None:
                    raise
                raise self._disk_error(cause) from e

    def close(self) -> None:
        """Ends the background thread."""
        self._writer.shutdown(wait=True)
        if self._stager is not None:
            self._stager.close()

    def _write(self, tensors: dict[str, Tensor], state: TrainerState) -> None:
        """In the background thread of every rank."""
        name = step_name(state.step)
        staging, final = self._folder / f"{_STAGING}{name}", self._folder / name
        group, rank = self._world.saving, self._world.rank
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed while saving
        error: BaseException | None = None
        mine: dict[str, Any] | None = None
        try:
            dcp.save(tensors, checkpoint_id=staging, process_group=group)
            if rank == 0:
                self._save_assets(staging / ASSETS)
                _write_synced(staging / _TRAINER, json.dumps(dataclasses.asdict(state), indent=1))
            # Each rank vouches for the bytes that it wrote; rank 0 for the rest.
            mine = _digests(staging, rank)
        except (Exception, CheckpointException) as e:  # the latter is no Exception
            error = e
        digests: list[dict[str, Any] | None] = [None] * self._world.world_size
        dist.all_gather_object(digests, mine, group=group)
        try:
            if error is None and None in digests:
                raise OSError(errno.EIO, "another rank could not write its part")
            if error is not None:
                raise error
            if rank == 0:
                files = {k: v for part in digests if part for k, v in part.items()}
                _write_synced(staging / _MANIFEST, json.dumps({"files": files}, indent=1))
                self._commit(staging, final)
        except BaseException:
            if rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            dist.barrier(group=group)  # `save` returns nowhere before the commit

    def _commit(self, staging: Path, final: Path) -> None:
        _sync_folder(staging)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that was passed over
        staging.rename(final)
        _sync_folder(self._folder)
        pointer = self._folder / f".{_LATEST}"
        _write_synced(pointer, final.name + "\n")
        pointer.replace(self._folder / _LATEST)
        for old in committed(self._folder)[self._config.keep_last :]:
            trash = old.with_name(f"{_STAGING}{old.name}")  # not committed from here on
            old.rename(trash)
            shutil.rmtree(trash)

    def _check_space(self, tensors: dict[str, Tensor]) -> None:
        """Refuses before a byte is written where it is plain that the disk is too small."""
        mine = sum(_local(t).numel() * _local(t).element_size() for t in tensors.values())
        need = torch.tensor(mine, dtype=torch.float64)
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


def step_name(step: int) -> str:
    """`step-00001000`."""
    return f"step-{step:08d}"


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def verify(checkpoint: Path, rank: int = 0, world_size: int = 1) -> None:
    """Checks a checkpoint's files against its manifest; each rank reads its share of them.

    Raises:
        DamagedError: Naming the first file that is missing, short or altered.
    """
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as e:
        raise _damaged(checkpoint, f"{_MANIFEST} cannot be read ({e})") from e
    for i, (name, expected) in enumerate(sorted(files.items())):
        path = checkpoint / name
        if not path.is_file():
            raise _damaged(checkpoint, f"{name} is missing")
        if path.stat().st_size != expected["size_bytes"]:
            raise _damaged(checkpoint, f"{name} has the wrong size")
        if i % world_size == rank and sha256_of(path) != expected["sha256"]:
            raise _damaged(checkpoint, f"{name} does not match its sha256")


def read_state(checkpoint: Path) -> TrainerState:
    """The part of a verified checkpoint that is not tensors."""
    return TrainerState(**json.loads((checkpoint / _TRAINER).read_text()))


def tensor_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Global shape of every tensor in a verified checkpoint."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    return {
        name: item.size
        for name, item in metadata.state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


def read_tensors(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors (or the local shards of DTensors) in place; not collective."""
    with warnings.catch_warnings():
        # It warns that it assumes a single process: each rank indeed reads alone.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)


def _stager(device: torch.device) -> DefaultStager:
    cuda = device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=cuda,
        )
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _digests(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Sizes and digests of the files that `rank` answers for."""
    mine = f"__{rank}_"
    paths = [
        p
        for p in folder.rglob("*")
        if p.is_file() and (p.name.startswith(mine) or (rank == 0 and p.name[:2] != "__"))
    ]
    return {
        str(p.relative_to(folder)): {"size_bytes": p.stat().st_size, "sha256": sha256_of(p)}
        for p in paths
    }


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's word behind a failed save (dcp wraps those of all ranks)."""
    if isinstance(error, OSError):
        return error
    for inner, _ in getattr(error, "failures", {}).values():
        found = _os_error(inner)
        if found is not None:
            return found
    cause = error.__cause__ or error.__context__
    return _os_error(cause) if cause is not None else None


def _damaged(checkpoint: Path, rule: str) -> DamagedError:
    return DamagedError(
        "resume", checkpoint, rule, "remove that folder, or resume from another checkpoint"
    )
