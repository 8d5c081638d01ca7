"""Checkpoints as they lie on disk, and how they are read; `saving.py` writes them.

They are staged, written by every rank, listed with digests and committed by one rename.

checkpoints/
  .staging-step-00001000/   being written; never read
  step-00001000/            committed
    __0_0.distcp ...        tensors by canonical name (torch.distributed.checkpoint)
    .metadata               where each tensor lies
    huggingface/            config and tokenizer, so that a checkpoint can be exported alone; of a
                            model that was loaded, the names that its files gave to tensors
    trainer.json            step, samples, tokens, digests, the resolved config
    manifest.json           every file above with its size and sha256
  LATEST                    name of the newest, for people and scripts; resume looks for itself
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from core.errors import ConfigError, DamagedError
from core.folder import MANIFEST, wrong_content, wrong_size
from trainer.data.order import OrderRule

TRAINER = "trainer.json"
LATEST = "LATEST"
ASSETS = "huggingface"
STORED_NAMES = "stored_names.json"


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
        order: How the order of samples counts the weights of a mixture; None in a checkpoint that
            was saved before there was more than one way.
    """

    step: int
    num_samples: int
    num_tokens: int
    elapsed_s: float
    data_digest: str
    tokenizer_fingerprint: str
    config: dict[str, Any]
    order: OrderRule | None = None


def step_name(step: int) -> str:
    """`step-00001000`."""
    return f"step-{step:08d}"


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def outdated(names: Iterable[str], keep_last: int, keep_every: int | None) -> list[str]:
    """Which of these checkpoints need not be kept, by `step_name`."""
    old = sorted(names, reverse=True)[keep_last:]
    return [n for n in old if keep_every is None or int(n.removeprefix("step-")) % keep_every]


def verify(checkpoint: Path, rank: int = 0, world_size: int = 1) -> None:
    """Checks a checkpoint's files against its manifest; each rank reads its share of them.

    Raises:
        DamagedError: Naming the first file that is missing, short or altered.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as e:
        raise _damaged(checkpoint, f"{MANIFEST} cannot be read ({e})") from e
    for i, (name, entry) in enumerate(sorted(files.items())):
        # Sizes are looked up by all ranks, contents are read by one each.
        check = wrong_content if i % world_size == rank else wrong_size
        if fault := check(checkpoint / name, entry):
            raise _damaged(checkpoint, f"{name} {fault}")


def read_state(checkpoint: Path) -> TrainerState:
    """The part of a verified checkpoint that is not tensors.

    Raises:
        ConfigError: The samples of its run are ordered by a rule that is not known here.
    """
    values = json.loads((checkpoint / TRAINER).read_text())
    order = values.pop("order", None)
    if order not in (None, *OrderRule):
        rule = f"its run orders samples by the rule {order!r}, which this version does not know"
        raise ConfigError("resume", checkpoint, rule, "update spotforge")
    return TrainerState(**values, order=None if order is None else OrderRule(order))


def tensor_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Global shape of every tensor in a verified checkpoint."""
    return {name: tensor.shape for name, tensor in described_tensors(checkpoint).items()}


def described_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor in a verified checkpoint, on the meta device."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    return {
        name: torch.empty(item.size, dtype=item.properties.dtype, device="meta")
        for name, item in metadata.state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


def read_tensors(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors (or the local shards of DTensors) in place; not collective."""
    with warnings.catch_warnings():
        # It warns that it assumes a single process: each rank indeed reads alone.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)


def _damaged(checkpoint: Path, rule: str) -> DamagedError:
    return DamagedError(
        "resume", checkpoint, rule, "remove that folder, or resume from another checkpoint"
    )
