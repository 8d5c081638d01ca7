"""Writes results as Hugging Face folders: functions that several targets share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compression.quantizer import Quantized
from compression.result import Result
from compression.scheme import Scheme
from compression.speed import TorchRunner
from compression.stream import BlockStream
from compression.targets.names import StoredNames
from core import layout
from core.errors import ConfigError, DamagedError
from trainer.exporter import save_weights
from trainer.weight_files import INDEX, SINGLE

_SHARD_BYTES = 256 * 2**20  # limit of memory; a larger block has a file to itself
_NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf"),
    *("config.json", layout.LINEAGE),
)

# Tensors and codes by name -> the tensors to store, and the metadata of their file.
Values = Mapping[str, Tensor | Quantized]
Pack = Callable[[Values], tuple[dict[str, Tensor], dict[str, str]]]


def write_folder(
    result: Result,
    source: Path,
    out: Path,
    pack: Pack,
    quantization_config: dict[str, Any] | None,
    keeps_fused: bool = False,
) -> None:
    """Writes weights, config and tokenizer: everything that transformers loads.

    Args:
        result: Result to pack.
        source: Folder of the dense model, for its tokenizer and configs.
        out: Folder to write; it is empty.
        pack: Function that converts the tensors of one file.
        quantization_config: Value of that field in config.json; None: no such field.
        keeps_fused: True to store dense experts fused, as transformers has them in memory.
    """
    stored_names = StoredNames(source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    copy_assets(source, out, config, result.dtype)
    weight_map: dict[str, str] = {}
    size = 0
    shards: list[Path] = []
    for values in _shards(result):
        packed, metadata = pack(values)
        tensors = _on_disk(packed, values, stored_names, keeps_fused)
        shards.append(out / f"model-{len(shards) + 1:05d}.safetensors")
        save_weights(tensors, shards[-1], metadata)
        weight_map |= dict.fromkeys(tensors, shards[-1].name)
        size += sum(t.numel() * t.itemsize for t in tensors.values())
    # The number of files is part of their names, and known only now.
    names = {p.name: f"{p.stem}-of-{len(shards):05d}.safetensors" for p in shards}
    if len(shards) == 1:
        names = {shards[0].name: SINGLE}
    for path in shards:
        path.rename(out / names[path.name])
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": size},
            "weight_map": {name: names[file] for name, file in weight_map.items()},
        }
        (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _on_disk(
    packed: Mapping[str, Tensor], values: Values, names: StoredNames, keeps_fused: bool
) -> dict[str, Tensor]:
    """Returns packed tensors under the names that they have on disk."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    dense = {name: t for name, t in packed.items() if name in values and t.dtype in kinds}
    experts = {name: t for name, t in dense.items() if names.is_expert(name)}
    stored = names.stored({n: t for n, t in dense.items() if not keeps_fused or n not in experts})
    if keeps_fused:
        stored |= names.fused(experts)
    for name, tensor in packed.items():
        # Codes, scales and zero points are named after the matrix that they replace.
        if name not in dense:
            layer, _, rest = name.rpartition(".")
            stored[f"{names.matrix(layer) or layer}.{rest}"] = tensor
    return stored


def copy_assets(source: Path, out: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Copies everything except weights, and writes config.json.

    Args:
        source: Folder of the dense model.
        out: Folder to write; it is empty.
        config: Content of config.json.
        dtype: Type of tensors that are not quantized.
    """
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    out.chmod(out.stat().st_mode | 0o700)  # copytree copies the mode of a read-only source, too
    config = config | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def takes_any(parent: Path, layers: Collection[str], schemes: set[Scheme], key: str) -> None:
    """Accepts any parent: the `check_parent` of a target that holds what transformers loads."""


def refuse_experts(layers: Collection[str], names: StoredNames, key: str, value: str) -> None:
    """Raises ConfigError if matrices of fused experts would have codes.

    Args:
        layers: Names of the layers that will have codes.
        names: Names of the model's tensors on disk.
        key: Key of the setting, for errors.
        value: Name of the target.
    """
    expert = next((layer for layer in layers if names.is_expert(layer)), None)
    if expert is not None:
        module = expert.rpartition(".")[0].rpartition(".")[0]
        rule = f"it cannot store codes of experts fused in one parameter, such as {module}"
        fix = "use target=compressed_tensors, or leave them out: layers.exclude=['*.experts.*']"
        raise ConfigError(key, value, rule, fix)


def refuse_own_forward(layers: Collection[str], names: StoredNames, key: str, value: str) -> None:
    """Raises ConfigError for a layer with codes whose class is not `nn.Linear` itself.

    Args:
        layers: Names of the layers that will have codes.
        names: Names of the model's tensors on disk.
        key: Key of the setting, for errors.
        value: Name of the target.
    """
    odd = next((name for name in layers if type(names.linears[name]) is not nn.Linear), None)
    if odd is not None:
        kind = type(names.linears[odd]).__name__
        rule = f"{odd} is a {kind}, whose code multiplies by a dense weight"
        raise ConfigError(key, value, rule, "use target=huggingface")


def refuse_needed_weights(
    parent: Path, layers: Collection[str], are_absent: bool, key: str, value: str
) -> None:
    """Raises ConfigError for layers whose dense weights the model's own code uses.

    Args:
        parent: Folder of the model.
        layers: Names of the layers that will have codes.
        are_absent: True if such layers have no attribute `weight` after loading.
        key: Key of the setting, for errors.
        value: Name of the target.
    """
    found = BlockStream(parent).needing_weights(layers, are_absent) if layers else []
    if found:
        left = ",".join(sorted({f"'*.{name.rpartition('.')[2]}*'" for name in found}))
        rule = f"the model's own code uses dense weights of {found[0]}, which would have codes only"
        fix = f"use target=huggingface, or exclude these layers: layers.exclude=[{left}]"
        raise ConfigError(key, value, rule, fix)


def times_layers(key: str) -> None:
    """Accepts any key: the `check_layer_times` of targets whose layers run in this process."""


def load_folder(
    folder: Path, dtype: torch.dtype | str = "auto", attention: str | None = None
) -> Any:
    """Returns the model of a folder that transformers can load by itself.

    Args:
        folder: Folder with config and weights.
        dtype: Type to compute in; auto: the type in config.json.
        attention: Name of transformers' attention implementation; None: transformers chooses.

    Raises:
        DamagedError: Weights are missing or have other shapes; transformers would go on with random
            ones.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=False,  # None would ask at the terminal
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, found = loaded
    rule, fix = None, "export or compress it again"
    if misfits := sorted(found["mismatched_keys"]):
        name, there, wanted = misfits[0]
        rule = f"{name} is {tuple(there)}, but {tuple(wanted)} by config.json"
        # Adding tokens to a model changes only this size.
        if there[1:] == wanted[1:] and wanted[0] == model.config.get_text_config().vocab_size:
            fix = f"set vocab_size={there[0]} if the weights are right, or export it again"
    elif lacks := sorted(found["missing_keys"]):
        rule = f"{len(lacks)} of the model's tensors are missing, such as {lacks[0]}"
        kind, saved = type(model).__name__, model.config.architectures or []
        if saved and kind not in saved:
            rule += f": it was saved as {saved[0]}, which is not a {kind}"
            fix = f"give a folder that was saved from a {kind}"
    if rule is not None:
        raise DamagedError("artifact", folder, rule, fix)
    return model.eval()


def torch_runner(folder: Path, dtype: torch.dtype | None = None) -> TorchRunner:
    """Returns the loaded model, to be timed."""
    return TorchRunner(load_folder(folder, dtype or "auto"))


def stored_bytes(folder: Path, layers: set[str]) -> int:
    """Returns the bytes that safetensors hold for some layers, including scales and zero points."""
    size = 0
    holders = StoredNames(folder).holders(layers)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                # Scales are named `layer.weight_scale`, or `layer._weight_scale` by torchao.
                module, _, last = name.rpartition(".")
                if name in holders or (module in holders and "weight" in last):
                    tensor = file.get_tensor(name)
                    size += tensor.numel() * tensor.itemsize
    return size


def kept_matrices(result: Result, source: Path) -> list[str]:
    """Returns names, in memory, of modules with dense matrices, always including the head.

    Args:
        result: Result of the compression.
        source: Folder of the parent.
    """
    kept = {
        name.removesuffix(".weight")
        for path in result.files()
        for name, value in result.read(path)
        if isinstance(value, Tensor) and value.ndim == 2 and name.endswith(".weight")
    }
    return sorted(kept | {StoredNames(source).head})


def _shards(result: Result) -> Iterator[Values]:
    values: dict[str, Tensor | Quantized] = {}
    size = 0
    for path in result.files():
        # Blocks are collected up to the limit, so that memory holds one file.
        if values and size + path.stat().st_size > _SHARD_BYTES:
            yield values
            values, size = {}, 0
        size += path.stat().st_size
        values |= result.read(path)
    yield values
