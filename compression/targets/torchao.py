"""torchao's tensors in a Hugging Face folder, with the codes that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.quantizer import Quantized
from compression.result import Result
from compression.scheme import Activation, Number, Scheme
from compression.targets.names import StoredNames
from compression.targets.packing import (
    Values,
    kept_matrices,
    load_folder,
    refuse_experts,
    refuse_needed_weights,
    refuse_own_forward,
    stored_bytes,
    times_layers,
    torch_runner,
    write_folder,
)
from core.errors import ConfigError, MissingExtraError

load, layer_bytes = load_folder, stored_bytes
runner, check_layer_times = torch_runner, times_layers


def check_parent(parent: Path, layers: Collection[str], schemes: set[Scheme], key: str) -> None:
    """Raises ConfigError for layers that cannot multiply by torchao's tensors.

    Args:
        parent: Folder of the model.
        layers: Names of the layers that will have codes.
        schemes: Schemes of the codes.
        key: Key of the setting, for errors.
    """
    names = StoredNames(parent)
    refuse_experts(layers, names, key, "torchao")
    refuse_own_forward(layers, names, key, "torchao")
    refuse_needed_weights(parent, layers, False, key, "torchao")


def check(schemes: set[Scheme], key: str) -> None:
    """Raises ConfigError for schemes that torchao cannot store, or cannot run on every device."""
    try:
        import torchao  # noqa: F401
    except ImportError as e:
        fix = "pip install 'spotforge[compression]'"
        raise MissingExtraError(key, "torchao", "torchao is not installed", fix) from e
    if not schemes:
        rule = "the result has no codes to pack"
        raise ConfigError(key, "torchao", rule, "use target=huggingface")
    if len(schemes) > 1:
        rule = "torchao's config in a Hugging Face folder names only one scheme"
        raise ConfigError(key, "torchao", rule, "use target=compressed_tensors")
    (scheme,) = schemes
    if scheme.activation is Activation.float8 and not torch.cuda.is_available():
        rule = "torchao makes and loads float8 with float8 inputs on a GPU only (compute 8.9)"
        raise ConfigError(key, "torchao", rule, "use target=compressed_tensors, or a GPU")
    if scheme.bits != 8 or scheme.group_size is not None or not scheme.symmetric:
        rule = "torchao 0.18 packs int4 with CUDA kernels only, and stores it as int8 elsewhere"
        raise ConfigError(key, "torchao", rule, "use target=compressed_tensors")


def pack(result: Result, source: Path, out: Path) -> None:
    """Writes the result to the folder `out`."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    scheme = next(iter(result.schemes().values()))
    wrap = _wrapper(scheme, result)

    def packed(values: Values) -> tuple[dict[str, Tensor], dict[str, str]]:
        wrapped = {
            name: wrap(value) if isinstance(value, Quantized) else value
            for name, value in values.items()
        }
        stored: tuple[dict[str, Tensor], dict[str, str]] = flatten_tensor_state_dict(wrapped)
        return stored

    write_folder(result, source, out, packed, _quantization_config(scheme, result, source))


def _config(scheme: Scheme) -> Any:
    """Returns the torchao config that would make tensors of this kind from the dense model."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
    )

    if scheme.number is Number.float8:
        if scheme.activation is Activation.none:
            return Float8WeightOnlyConfig()
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    if scheme.activation is Activation.none:
        return Int8WeightOnlyConfig()
    return Int8DynamicActivationInt8WeightConfig()


def _wrapper(scheme: Scheme, result: Result) -> Callable[[Quantized], Tensor]:
    """Returns a function from codes to torchao's tensor.

    torchao quantizes the matrix by its own config; then its codes and scales are replaced by ours.
    """
    from torch import nn
    from torchao.quantization import quantize_

    def wrap(value: Quantized) -> Tensor:
        outputs, inputs = value.codes.shape
        layer = nn.Linear(inputs, outputs, bias=False, dtype=result.dtype)
        layer.weight.data = value.dequantize().to(result.dtype)
        quantize_(layer, _config(scheme))
        tensor: Any = layer.weight.data
        # The constructors of these tensors change between versions; their attributes have not.
        tensor.qdata.copy_(value.codes)
        tensor.scale.copy_(value.scales.view_as(tensor.scale).to(tensor.scale.dtype))
        packed: Tensor = tensor
        return packed

    return wrap


def _quantization_config(scheme: Scheme, result: Result, source: Path) -> dict[str, Any]:
    from transformers import TorchAoConfig

    kept = kept_matrices(result, source)
    described: dict[str, Any] = TorchAoConfig(
        _config(scheme), modules_to_not_convert=kept
    ).to_dict()
    return described
