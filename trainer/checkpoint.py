"""Reads checkpoints, and describes their layout on disk; `checkpointer.py` writes them.

They are staged, written by every rank, listed with digests and committed by one rename.

checkpoints/
  .staging-step-00001000/   being written; never read
  step-00001000/            committed
    __0_0.distcp ...        tensors by canonical name (torch.distributed.checkpoint); the first
                            number is the rank that wrote the file
    .metadata               location of each tensor
    huggingface/            config and tokenizer, so that a checkpoint can be exported alone; for a
                            model that was loaded, also the names of tensors in its files
    logs/                   metrics, events and samples up to here, if the run may go on elsewhere
    trainer.json            step, samples, tokens, digests, the resolved config
    manifest.json           every file above with its size and sha256; the start that saved it
  LATEST                    name of the newest, for people and scripts; resume does not read it
  GENERATION                number of the newest start of the run, which alone may commit

Where machines have disks of their own, each disk has the tensors that its ranks wrote and all
other files; the manifest, the same on all, lists everything. Copying the folders of all machines
into one makes an ordinary checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import IOBase
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from core import layout
from core.errors import ConfigError, DamagedError, SpotforgeError
from core.folder import Manifest, remove, staging_of, wrong_content, wrong_size
from trainer.data.order import OrderRule
from trainer.distant_file import DistantFile


@dataclass(frozen=True)
class TrainerState:
    """Holds the state of a run other than tensors; the same on every rank and at every world size.

    Attributes:
        step: Number of completed optimizer steps.
        num_samples: Number of samples consumed, which is the position in the endless order of
            samples.
        num_tokens: Number of tokens consumed.
        elapsed_s: Training time over all starts, in seconds.
        data_digest: Digest of the prepared data and its mixture.
        tokenizer_fingerprint: Fingerprint of the tokenizer.
        config: Resolved settings of the run.
        order: Rule by which the order of samples counts the weights of a mixture; None in
            checkpoints that were saved before there was more than one rule.
    """

    step: int
    num_samples: int
    num_tokens: int
    elapsed_s: float
    data_digest: str
    tokenizer_fingerprint: str
    config: dict[str, Any]
    order: OrderRule | None = None


@dataclass(frozen=True)
class Located:
    """Represents a checkpoint, all of whose files were found.

    Attributes:
        folder: The folder on this disk, with all files but those in `elsewhere`.
        elsewhere: Files with tensors that are read from other machines or an object store.
        fetched: Folder for the blocks that are fetched of them; None if there are none.
    """

    folder: Path
    elsewhere: Mapping[str, DistantFile] = field(default_factory=dict)
    fetched: Path | None = None

    def read(self, tensors: dict[str, Tensor]) -> None:
        """Fills tensors, or the local shards of DTensors, in place; not collective.

        Raises:
            SpotforgeError: A part that is elsewhere cannot be read.
            OSError: A part on this disk cannot be read, or what is fetched cannot be written.
        """
        reader = dcp.FileSystemReader(self.folder)
        reader.fs = _Files(self.elsewhere)
        with warnings.catch_warnings():
            # torch warns that it assumes a single process, which is what happens: each rank reads
            # alone.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.load(tensors, storage_reader=reader, no_dist=True)
            except CheckpointException as e:  # it wraps every error, also those for the user
                for error, _ in e.failures.values():
                    if isinstance(error, SpotforgeError | OSError):
                        raise error from e
                raise

    def forget_fetched(self) -> None:
        """Removes from this disk what was fetched; no process of this machine may be reading."""
        if self.fetched is not None:
            remove(self.fetched)


def fetched_folder(folder: Path, checkpoint: str) -> Path:
    """Returns the folder for blocks of a checkpoint's files that are fetched from elsewhere."""
    return staging_of(folder / f"fetched-{checkpoint}")


class _Files(FileSystem):
    """Opens the files of a checkpoint, wherever they are."""

    def __init__(self, elsewhere: Mapping[str, DistantFile]) -> None:
        self._elsewhere = elsewhere

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[IOBase, None, None]:
        distant = self._elsewhere.get(Path(path).name)
        if distant is None:
            with super().create_stream(path, mode) as stream:
                yield stream
        else:
            with distant.open() as stream:
                yield stream


def writer_of(file: str) -> int | None:
    """Returns the rank that wrote a file of a checkpoint with tensors; None for any other file."""
    found = re.match(r"__(\d+)_", file)  # torch.distributed.checkpoint names them so
    return int(found[1]) if found else None


def step_name(step: int) -> str:
    """Returns the name of a checkpoint's folder, as `step-00001000`."""
    return f"{layout.STEP}{step:08d}"


def committed(folder: Path) -> list[Path]:
    """Returns the committed checkpoints, newest first."""
    return sorted(folder.glob(f"{layout.STEP}*"), reverse=True)


def outdated(names: Iterable[str], keep_last: int, keep_every: int | None) -> list[str]:
    """Returns the names of the checkpoints that need not be kept; names as by `step_name`."""
    old = sorted(names, reverse=True)[keep_last:]
    return [n for n in old if keep_every is None or int(n.removeprefix(layout.STEP)) % keep_every]


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint so that no resume takes it, and returns its new path.

    One that was set aside before, of the same step, is removed.
    """
    aside = checkpoint.with_name(f"passed-over-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def verify(checkpoint: Path, rank: int = 0, world_size: int = 1) -> None:
    """Verifies a checkpoint's files against its manifest; each rank reads its share of them.

    Raises:
        DamagedError: A file is missing, short or altered; names the first one.
    """
    files = read_manifest(checkpoint)
    for i, (name, entry) in enumerate(sorted(files.items())):
        # Sizes are cheap, so all ranks check all of them; contents are read by one rank each.
        check = wrong_content if i % world_size == rank else wrong_size
        if fault := check(checkpoint / name, entry):
            if writer_of(name) is not None and not (checkpoint / name).exists():
                fault += "; if machines had disks of their own, it is on another one"
            raise _damaged(checkpoint, f"{name} {fault}")


def read_manifest(checkpoint: Path) -> Manifest:
    """Returns the files that a checkpoint lists.

    Raises:
        DamagedError: The manifest cannot be read.
    """
    try:
        files: Manifest = json.loads((checkpoint / layout.MANIFEST).read_text())["files"]
        return files
    except (OSError, ValueError, KeyError) as e:
        raise _damaged(checkpoint, f"{layout.MANIFEST} cannot be read ({e})") from e


def read_state(checkpoint: Path) -> TrainerState:
    """Returns the part of a verified checkpoint that is not tensors.

    Raises:
        ConfigError: Its run orders samples by a rule that this version does not know.
    """
    values = json.loads((checkpoint / layout.TRAINER_STATE).read_text())
    order = values.pop("order", None)
    if order not in (None, *OrderRule):
        rule = f"its run orders samples by the rule {order!r}, which this version does not know"
        raise ConfigError("resume", checkpoint, rule, "update spotforge")
    return TrainerState(**values, order=None if order is None else OrderRule(order))


def tensor_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Returns the global shape of every tensor in a verified checkpoint."""
    return {name: tensor.shape for name, tensor in described_tensors(checkpoint).items()}


def described_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Returns every tensor in a verified checkpoint as a tensor on the meta device."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    return {
        name: torch.empty(item.size, dtype=item.properties.dtype, device="meta")
        for name, item in metadata.state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


def _damaged(checkpoint: Path, rule: str) -> DamagedError:
    return DamagedError(
        "resume", checkpoint, rule, "remove that folder, or resume from another checkpoint"
    )
