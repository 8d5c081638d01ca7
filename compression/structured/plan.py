"""The plan of one structured pruning, and the places of its intermediate files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compression.recipe import StructuredPruneConfig
from compression.structured.family import Family, Shape
from core.folder import staged_file


@dataclass(frozen=True)
class Plan:
    """Sizes, settings and folders of one structured pruning.

    Attributes:
        source: Folder of the parent.
        work: Folder of intermediate files, from which a stopped call resumes.
        config: Settings that were checked.
        family: Structure of the parent.
        shape: Sizes of the child.
        per_layer: Settings of the parent's config that have an entry for each layer.
    """

    source: Path
    work: Path
    config: StructuredPruneConfig
    family: Family
    shape: Shape
    per_layer: dict[str, list[Any]]

    @property
    def refits(self) -> bool:
        """True if remaining layers are to be fitted, and something was removed."""
        return self.config.refit and self.shape != self.family.shape

    def hidden(self, index: int) -> Path:
        """Returns the file with a block's input."""
        return self.work / f"hidden-{index:05d}.bin"

    def measured(self, index: int) -> Path:
        """Returns the file with the scores of a block."""
        return self.work / f"measured-{index:05d}.safetensors"

    def save(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Writes the scores of a block in one step."""
        path = self.measured(index)
        with staged_file(path) as staging:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging)

    def score(self, index: int, name: str) -> Tensor:
        """Returns one of a block's scores."""
        with safe_open(self.measured(index), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def most_important(scores: Tensor, count: int) -> Tensor:
    """Returns the positions of the largest scores in order: (count) int64; ties go to the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def kept_of_block(shape: Shape, heads: Tensor, mlp: Tensor) -> dict[str, Tensor]:
    """Returns the positions that a block keeps of its own dimensions.

    Args:
        shape: Sizes of the child.
        heads: Scores of the parent's key-value heads.
        mlp: Scores of its intermediate channels.
    """
    kept = most_important(heads, shape.heads).unsqueeze(1)

    # Rows of all heads are in one matrix: head k has the rows from k * width on.
    def of_heads(width: int) -> Tensor:
        return (kept * width + torch.arange(width)).flatten()

    return {
        "key": of_heads(shape.head_dim),
        "query": of_heads(shape.head_dim * shape.queries),
        "mlp": most_important(mlp, shape.mlp),
    }
