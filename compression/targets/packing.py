"""From a result to a Hugging Face folder: what all targets of that kind share."""

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

from compression.grid import Quantized
from compression.result import Result
from compression.scheme import Scheme
from compression.speed import TorchRunner
from compression.stream import BlockStream
from compression.targets.names import StoredNames
from core.errors import ConfigError, DamagedError
from trainer.export import save_weights

_SHARD_BYTES = 256 * 2**20  # bounds memory; a block of more than that has a file to itself
_NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf"),
    *("config.json", "lineage.json"),
)

# Tensors and codes of a file by name -> what is stored for them, and what the file says of them.
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
    """Writes weights, config, tokenizer: all that transformers loads.

    Args:
        result: What to pack.
        source: Folder of the dense model, for its tokenizer and configs.
        out: An empty folder.
        pack: Of each file.
        quantization_config: Goes into config.json.
        keeps_fused: Whether dense experts are stored as transformers has them in memory.
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
    names = {p.name: f"{p.stem}-of-{len(shards):05d}.safetensors" for p in shards}
    if len(shards) == 1:
        names = {shards[0].name: "model.safetensors"}
    for path in shards:
        path.rename(out / names[path.name])
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": size},
            "weight_map": {name: names[file] for name, file in weight_map.items()},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _on_disk(
    packed: Mapping[str, Tensor], values: Values, names: StoredNames, keeps_fused: bool
) -> dict[str, Tensor]:
    """What a target made of some values, by the names that it has on disk."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    dense = {name: t for name, t in packed.items() if name in values and t.dtype in kinds}
    experts = {name: t for name, t in dense.items() if names.is_expert(name)}
    stored = names.stored({n: t for n, t in dense.items() if not keeps_fused or n not in experts})
    if keeps_fused:
        stored |= names.fused(experts)
    for name, tensor in packed.items():
        if name not in dense:  # codes, and what belongs to them
            layer, _, rest = name.rpartition(".")
            stored[f"{names.matrix(layer) or layer}.{rest}"] = tensor
    return stored


def copy_assets(source: Path, out: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Copies all but weights, and writes config.json.

    Args:
        source: Folder of the dense model.
        out: An empty folder.
        config: What config.json says.
        dtype: Of what is not quantized.
    """
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    out.chmod(out.stat().st_mode | 0o700)  # copytree copies a read-only parent's mode, too
    config = config | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def takes_any(parent: Path, layers: Collection[str], schemes: set[Scheme], key: str) -> None:
    """The `check_parent` of a target that holds whatever transformers loads."""


def refuse_experts(layers: Collection[str], names: StoredNames, key: str, value: str) -> None:
    """Raises ConfigError where matrices of fused experts are to be in codes.

    Args:
        layers: Names of those that will be in codes.
        names: Of their model.
        key: For errors.
        value: The target.
    """
    expert = next((layer for layer in layers if names.is_expert(layer)), None)
    if expert is not None:
        module = expert.rpartition(".")[0].rpartition(".")[0]
        rule = f"it has no codes for experts in one parameter, as {module}"
        fix = "use target=compressed_tensors, or leave them out: layers.exclude=['*.experts.*']"
        raise ConfigError(key, value, rule, fix)


def refuse_own_forward(layers: Collection[str], names: StoredNames, key: str, value: str) -> None:
    """Raises ConfigError for a layer that computes otherwise than `nn.Linear`, with its codes.

    Args:
        layers: Names of those that will be in codes.
        names: Of their model.
        key: For errors.
        value: The target.
    """
    odd = next((name for name in layers if type(names.linears[name]) is not nn.Linear), None)
    if odd is not None:
        kind = type(names.linears[odd]).__name__
        rule = f"{odd} is a {kind}, whose own code multiplies by a dense weight"
        raise ConfigError(key, value, rule, "use target=huggingface")


def refuse_needed_weights(
    parent: Path, layers: Collection[str], are_absent: bool, key: str, value: str
) -> None:
    """Raises ConfigError for layers whose weights the model's own code takes; codes are none.

    Args:
        parent: Folder of the model.
        layers: Names of those that will be in codes.
        are_absent: Whether these layers have nothing called `weight` then.
        key: For errors.
        value: The target.
    """
    found = BlockStream(parent).needing_weights(layers, are_absent) if layers else []
    if found:
        left = ",".join(sorted({f"'*.{name.rpartition('.')[2]}*'" for name in found}))
        rule = f"the model's own code takes weights of {found[0]}, of which only codes are there"
        fix = f"use target=huggingface, or leave out what is named so: layers.exclude=[{left}]"
        raise ConfigError(key, value, rule, fix)


def times_layers(key: str) -> None:
    """The `check_layer_times` of targets whose layers run in this process."""


def load_folder(
    folder: Path, dtype: torch.dtype | str = "auto", attention: str | None = None
) -> Any:
    """A model that transformers knows how to load by itself.

    Args:
        folder: Of config and weights.
        dtype: To compute in; auto: what config.json says.
        attention: As transformers calls its implementations; None: its own choice.

    Raises:
        DamagedError: Weights are not there, or of other shapes: transformers draws them at random
            and goes on.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=False,  # else it asks at the terminal
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, found = loaded
    rule, fix = None, "export or compress it again"
    if misfits := sorted(found["mismatched_keys"]):
        name, there, wanted = misfits[0]
        rule = f"{name} is {tuple(there)} there, and {tuple(wanted)} by its config.json"
    elif lacks := sorted(found["missing_keys"]):
        rule = f"{len(lacks)} of its model's tensors are not there, as {lacks[0]}"
        kind, saved = type(model).__name__, model.config.architectures or []
        if saved and kind not in saved:
            rule += f": it was saved as {saved[0]}, which is no {kind}"
            fix = f"give a folder that was saved from a {kind}"
    if rule is not None:
        raise DamagedError("artifact", folder, rule, fix)
    return model.eval()


def torch_runner(folder: Path, dtype: torch.dtype | None = None) -> TorchRunner:
    """The same, to be timed."""
    return TorchRunner(load_folder(folder, dtype or "auto"))


def stored_bytes(folder: Path, layers: set[str]) -> int:
    """Of all that safetensors hold for some layers, scales and zero points counted."""
    size = 0
    holders = StoredNames(folder).holders(layers)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                # `layer.weight_scale`, or torchao's `layer._weight_scale`
                module, _, last = name.rpartition(".")
                if name in holders or (module in holders and "weight" in last):
                    tensor = file.get_tensor(name)
                    size += tensor.numel() * tensor.itemsize
    return size


def kept_matrices(result: Result, source: Path) -> list[str]:
    """Names, in memory, of modules whose matrices are not in codes, the head always among them.

    Args:
        result: Of the compression.
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
        if values and size + path.stat().st_size > _SHARD_BYTES:
            yield values
            values, size = {}, 0
        size += path.stat().st_size
        values |= result.read(path)
    yield values
