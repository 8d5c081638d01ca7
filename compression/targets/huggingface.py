"""Dense weights in an ordinary Hugging Face folder, for pruned models and to drop all codes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from compression.quantizer import Quantized
from compression.result import Result
from compression.scheme import Activation, Scheme
from compression.targets.packing import (
    Values,
    load_folder,
    stored_bytes,
    takes_any,
    times_layers,
    torch_runner,
    write_folder,
)
from core.errors import ConfigError

check_parent, load, layer_bytes = takes_any, load_folder, stored_bytes
runner, check_layer_times = torch_runner, times_layers


def check(schemes: set[Scheme], key: str) -> None:
    """Raises ConfigError for schemes that round inputs; weights of any kind are dequantized."""
    odd = next((s.activation for s in schemes if s.activation is not Activation.none), None)
    if odd is not None:
        rule = f"dense weights do not round their inputs to {odd.value}, as the evaluation did"
        raise ConfigError(key, "huggingface", rule, "use target=compressed_tensors")


def pack(result: Result, source: Path, out: Path) -> None:
    """Writes the result to the folder `out`."""

    def dense(values: Values) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {
            name: value.dequantize() if isinstance(value, Quantized) else value
            for name, value in values.items()
        }
        return {name: tensor.to(result.dtype) for name, tensor in tensors.items()}, {}

    write_folder(result, source, out, dense, None)
