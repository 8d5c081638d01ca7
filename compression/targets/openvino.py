"""OpenVINO: an IR folder for CPUs with the chosen codes, made and run in its own environment.

Unquantized weights are stored as float16, which represents bfloat16 except for tiny magnitudes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from compression.quantizer import Quantized
from compression.result import Result
from compression.scheme import Activation, Number, Scheme
from compression.speed import Timing
from compression.targets import huggingface
from compression.targets.names import StoredNames
from compression.targets.openvino_program import IntegerWeight, OpenVino, WeightFormat
from compression.targets.packing import refuse_experts
from core.errors import ConfigError

_WEIGHTS = "openvino_model.bin"


def check(schemes: set[Scheme], key: str) -> None:
    """Raises ConfigError for schemes that an IR cannot hold, or if OpenVINO is not available."""
    for scheme in schemes:
        if scheme.number is Number.float8 or scheme.activation is not Activation.none:
            rule = "OpenVINO decides itself how inputs are rounded, and has no float8 on a CPU"
            raise ConfigError(key, "openvino", rule, "set number=int activation=none")
        if scheme.bits not in (4, 8):
            rule = f"an IR holds 4 or 8 bits, not {scheme.bits}"
            raise ConfigError(key, "openvino", rule, "set bits=4 or bits=8")
    OpenVino().versions()


def check_parent(parent: Path, layers: Collection[str], schemes: set[Scheme], key: str) -> None:
    """Raises ConfigError for layers that have no constant of their own in an IR.

    The export program checks the architecture.
    """
    refuse_experts(layers, StoredNames(parent), key, "openvino")


def pack(result: Result, source: Path, out: Path) -> None:
    """Writes the result to the folder `out`."""
    codes = {
        name: _integers(value)
        for path in result.files()
        for name, value in result.read(path)
        if isinstance(value, Quantized)
    }
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        dense = Path(name) / "dense"  # the export reads shapes and everything without codes from it
        huggingface.pack(result, source, dense)
        OpenVino().export(dense, out, WeightFormat("fp16"), codes)


def load(folder: Path) -> Any:
    """Returns the artifact as a model: token ids (N, T) in, logits out; each call is a process."""
    return _Ir(folder)


def check_layer_times(key: str) -> None:
    """Raises ConfigError, since OpenVINO can only time a whole model."""
    rule = "OpenVINO compiles a model as a whole, in another process: no layer is timed alone"
    raise ConfigError(key, "openvino", rule, "set a budget of bits or MB, or another target")


def layer_bytes(folder: Path, layers: set[str]) -> int | None:
    """Returns None: an IR file does not say which bytes belong to which layer."""


class _Ir:
    """An IR folder that can be called as transformers' models are, and timed."""

    dtype = None  # OpenVINO decides

    def __init__(self, folder: Path) -> None:
        self._folder, self._program = folder, OpenVino()
        self.memory_bytes = (folder / _WEIGHTS).stat().st_size

    def __call__(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        # Rounding inputs at run time is OpenVINO's choice, not a property of the artifact.
        logits = self._program.logits(self._folder, input_ids.numpy(), dynamic_quantization=False)
        return SimpleNamespace(logits=torch.from_numpy(logits))

    def once(self, prompt_tokens: int, new_tokens: int, seed: int) -> Timing:
        """Times one prompt and new tokens, see `Runner`."""
        found = self._program.speed(
            self._folder,
            prompt_tokens,
            new_tokens,
            repeats=1,
            num_threads=torch.get_num_threads(),
            seed=seed,
        )
        return Timing(found.prefill_tokens_per_s, found.decode_tokens_per_s, found.cpu_ms_per_token)


def runner(folder: Path, dtype: torch.dtype | None = None) -> _Ir | None:
    """Returns the artifact, to be timed; None for a given type, which OpenVINO chooses itself."""
    return _Ir(folder) if dtype is None else None


def _integers(value: Quantized) -> IntegerWeight:
    bits: Literal[4, 8] = 4 if value.scheme.bits == 4 else 8
    zero_points = None if value.zero_points is None else value.zero_points.numpy()
    return IntegerWeight(bits, value.codes.numpy(), value.scales.float().numpy(), zero_points)
