"""Dense weights: an ordinary Hugging Face folder. For pruned models."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from compression.grid import Quantized
from compression.result import Result
from compression.scheme import Scheme
from compression.targets.packing import write_folder


def check(schemes: set[Scheme], key: str) -> None:
    """Takes everything: a quantized weight is stored as what it computes with."""


def pack(result: Result, source: Path, out: Path) -> None:
    """Writes the folder `out`."""

    def dense(name: str, value: Tensor | Quantized) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensor = value.dequantize() if isinstance(value, Quantized) else value
        return {name: tensor.to(result.dtype)}, {}

    write_folder(result, source, out, dense, None)
