"""compressed-tensors: the format that transformers and vLLM load without changes.

Codes are stored as they were chosen; the library packs them and describes them in config.json.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.quantizer import Quantized
from compression.result import Result
from compression.scheme import Activation, Number, Scheme
from compression.speed import TorchRunner
from compression.targets.names import StoredNames
from compression.targets.packing import (
    Values,
    kept_matrices,
    load_folder,
    refuse_needed_weights,
    refuse_own_forward,
    stored_bytes,
    times_layers,
    write_folder,
)
from core.errors import ConfigError, MissingExtraError

_INSTALL = "pip install 'spotforge[compression]'"

# The library shows progress bars whenever it loads or first runs a model, even with TQDM_DISABLE.
_SHOWS_BARS = (
    "compressed_tensors.quantization.lifecycle.apply",
    "compressed_tensors.offload.dispatch",
    "compressed_tensors.compressors.model_compressors.model_compressor",
)

layer_bytes, check_layer_times = stored_bytes, times_layers


def check_parent(parent: Path, layers: Collection[str], schemes: set[Scheme], key: str) -> None:
    """Raises ConfigError for layers that transformers does not load in the packed form.

    Args:
        parent: Folder of the model.
        layers: Names of the layers that will have codes.
        schemes: Schemes of the codes.
        key: Key of the setting, for errors.
    """
    names = StoredNames(parent)
    is_packed = any(map(_is_packed, schemes))
    if is_packed:
        refuse_own_forward(layers, names, key, "compressed_tensors")
    refuse_needed_weights(parent, layers, is_packed, key, "compressed_tensors")
    experts = [layer for layer in layers if names.is_expert(layer)]
    if not experts:
        return
    fix = "use target=huggingface, or leave them out: layers.exclude=['*.experts.*']"
    kept = next((n for n in names.linears if names.is_expert(n) and n not in layers), None)
    if kept is not None:
        rule = f"transformers reads codes of all experts or of none, and {kept} is left out"
        raise ConfigError(key, "compressed_tensors", rule, fix)
    if not all(map(_is_packed, schemes)):
        rule = "transformers unpacks experts on loading, and does not round their inputs"
        fix = "choose a recipe that quantizes weights only, or layers.exclude=['*.experts.*']"
        raise ConfigError(key, "compressed_tensors", rule, fix)
    if len(schemes) > 1:
        rule = "transformers reads the codes of all experts by one scheme"
        raise ConfigError(key, "compressed_tensors", rule, fix)
    fused = next((layer for layer in experts if names.matrix(layer) is None), None)
    if fused is not None:
        rule = f"files of this architecture store no separate matrix for {fused}"
        raise ConfigError(key, "compressed_tensors", rule, fix)


def load(folder: Path, dtype: torch.dtype | str = "auto", attention: str | None = None) -> Any:
    """Returns a model of transformers; see `load_folder`."""
    for name in _SHOWS_BARS:
        vars(importlib.import_module(name))["tqdm"] = _no_bar
    return load_folder(folder, dtype, attention)


def runner(folder: Path, dtype: torch.dtype | None = None) -> TorchRunner:
    """Returns the loaded model, to be timed."""
    return TorchRunner(load(folder, dtype or "auto"))


def _no_bar(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    return iterable


def check(schemes: set[Scheme], key: str) -> None:
    """Raises ConfigError for schemes that the format, or its readers, do not support."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as e:
        rule = "compressed-tensors is not installed"
        raise MissingExtraError(key, "compressed_tensors", rule, _INSTALL) from e
    if not schemes:
        rule = "the result has no codes to pack"
        raise ConfigError(key, "compressed_tensors", rule, "use target=huggingface")
    for scheme in schemes:
        if not scheme.symmetric:
            rule = "transformers cannot load zero points that compressed-tensors 0.20 packed"
            raise ConfigError(key, "compressed_tensors", rule, "set symmetric=true")
        if scheme.activation is not Activation.none and scheme.group_size is not None:
            rule = "engines that round inputs take one scale a row, and no groups"
            raise ConfigError(key, "compressed_tensors", rule, "set group_size=null")
        if scheme.activation is Activation.int8 and scheme.bits != 8:
            rule = "engines that round inputs to int8 take weights of 8 bits"
            raise ConfigError(key, "compressed_tensors", rule, "set bits=8")
        if (scheme.activation is Activation.float8) != (scheme.number is Number.float8):
            rule = "float8 weights go with float8 inputs"
            raise ConfigError(key, "compressed_tensors", rule, "set number and activation alike")


def pack(result: Result, source: Path, out: Path) -> None:
    """Writes the result to the folder `out`."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    def packed(values: Values) -> tuple[dict[str, Tensor], dict[str, str]]:
        stored: dict[str, Tensor] = {}
        for name, value in values.items():
            if not isinstance(value, Quantized):
                stored[name] = value
                continue
            stored[f"{name}_scale"] = value.scales.to(result.dtype)
            if not _is_packed(value.scheme):
                stored[name] = value.codes
                continue
            bits = value.scheme.bits
            stored[f"{name}_packed"] = pack_to_int32(value.codes, bits).contiguous()
            stored[f"{name}_shape"] = torch.tensor(value.codes.shape)
        return stored, {}

    # The library's loader would take dense experts under their names on disk for codes, and drop
    # them.
    config = _quantization_config(result, source)
    write_folder(result, source, out, packed, config, keeps_fused=True)


def _is_packed(scheme: Scheme) -> bool:
    return scheme.activation is Activation.none


def _quantization_config(result: Result, source: Path) -> dict[str, Any]:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    layers = result.schemes()
    is_uniform = len(set(layers.values())) == 1
    groups = {}
    for index, scheme in enumerate(dict.fromkeys(layers.values())):
        names = sorted(name for name, s in layers.items() if s == scheme)
        weights = QuantizationArgs(
            num_bits=scheme.bits,
            type="float" if scheme.number is Number.float8 else "int",
            symmetric=True,
            strategy="channel" if scheme.group_size is None else "group",
            group_size=scheme.group_size,
        )
        inputs = None
        if scheme.activation is not Activation.none:
            kind = "float" if scheme.activation is Activation.float8 else "int"
            inputs = QuantizationArgs(
                num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True
            )
        groups[f"group_{index}"] = QuantizationScheme(
            # Lists layers by name only if they differ: engines match the class `Linear` faster and
            # safely.
            targets=["Linear"] if is_uniform else names,
            weights=weights,
            input_activations=inputs,
            format=_format(scheme),
        )
    formats = {_format(scheme) for scheme in layers.values()}
    config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=kept_matrices(result, source),
    )
    described: dict[str, Any] = config.model_dump(mode="json")
    return described


def _format(scheme: Scheme) -> str:
    if _is_packed(scheme):
        return "pack-quantized"
    return "float-quantized" if scheme.number is Number.float8 else "int-quantized"
