"""LoRA adapters in PEFT's format, each served under its own name; checked without torch.

An adapter is `adapter_config.json` and `adapter_model.safetensors`. It adds scale * B A x to the
output of a linear layer, with A (r, in) and B (out, r). An adapter that does more is refused.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from core.errors import ConfigError
from core.folder import digest_of, sha256_of
from serving.artifact import Artifact

_log = logging.getLogger("spotforge.serving")
WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
# Initializations that leave the base's weights as they are. PiSSA, OLoRA and others change them,
# so their adapter is right only on the changed base, which the folder does not contain.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")
_READ = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
    "init_lora_weights",
}
# These keys concern training or merging, or the tensors' names say the same. Any other key might
# change the computation, so it has to be empty.
_NOT_NEEDED = {
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
}


@dataclass(frozen=True)
class Layer:
    """An adapter's matrices for one linear layer.

    Attributes:
        rank: Rows of A, and columns of B.
        in_features: Input features of the layer.
        out_features: Output features of the layer.
        scale: Factor of B A: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732).
    """

    rank: int
    in_features: int
    out_features: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter whose files were checked, but not yet against its base.

    Attributes:
        name: Name that clients use for the adapter.
        folder: Folder with the adapter's two files.
        digest: SHA-256 over the digests of the two files.
        base: Name or folder of the model that the adapter was trained on, according to its config;
            None: the config does not say.
        layers: Matrices by the name of the layer in the base.
    """

    name: str
    folder: Path
    digest: str
    base: str | None
    layers: dict[str, Layer]


def key_of(name: str) -> str:
    """Returns the configuration key that names an adapter."""
    return f"adapters.{name}"


def tensor_name(layer: str, side: str) -> str:
    """Returns the name that a matrix has in the weights file.

    Args:
        layer: Name of the layer in the base.
        side: `A` or `B`.
    """
    return f"base_model.model.{layer}.lora_{side}.weight"


def identity(artifact: Artifact, adapter: Adapter | None) -> tuple[str, str]:
    """Returns the version and digest in responses: the base's, then `+` and the adapter's."""
    if adapter is None:
        return artifact.version, artifact.digest
    version = f"{artifact.version}+{adapter.digest[: len(artifact.version)]}"
    return version, f"{artifact.digest}+{adapter.digest}"


def check_names(adapters: dict[str, str]) -> None:
    """Raises ConfigError for an adapter name that clients could not use."""
    for name, folder in adapters.items():
        if _NAME.fullmatch(name) is None:
            rule = "names have up to 128 of A-Z, a-z, 0-9, ., _, : and -"
            raise ConfigError(key_of(name), folder, rule, "choose another")


def resolve_all(given: dict[str, str], artifact: Artifact) -> dict[str, Adapter]:
    """Reads all adapters of the settings and checks them as far as possible without the base.

    Args:
        given: Folders by name.
        artifact: Base of the adapters. An adapter that names another base is logged as a warning
            only, since a base is often moved or renamed.

    Raises:
        ConfigError: An adapter cannot be served.
    """
    adapters = {name: resolve(name, folder) for name, folder in given.items()}
    for adapter in adapters.values():
        base = Path(adapter.base or artifact.folder)
        if base.name not in (artifact.folder.name, artifact.folder.parent.name):
            said = "%s: its config says that it was trained on %s, but it is served on %s"
            _log.warning(said, key_of(adapter.name), adapter.base, artifact.folder)
    return adapters


def resolve(name: str, given: str) -> Adapter:
    """Reads an adapter's config, and the names and shapes of its matrices.

    Args:
        name: Name that clients use for the adapter.
        given: Folder of the adapter.

    Raises:
        ConfigError: The adapter cannot be served.
    """
    folder, key = Path(given).expanduser().resolve(), key_of(name)
    for file in (_CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            fix = "give a folder that PEFT saved (save_pretrained)"
            raise ConfigError(key, given, f"has no {file}", fix)
    config = _read_config(key, given, folder / _CONFIG)
    return Adapter(
        name,
        folder,
        _digest(folder),
        config.get("base_model_name_or_path"),
        _layers(key, given, config, _shapes(key, given, folder / WEIGHTS)),
    )


def _read_config(key: str, given: str, path: Path) -> dict[str, Any]:
    fix = "merge it into its base (merge_and_unload), and serve that"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConfigError(key, given, f"its {_CONFIG} is not JSON", "save it again") from e
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError(key, given, "is not a LoRA adapter of PEFT", "give one that PEFT saved")
    wanted: dict[str, tuple[object, ...]] = {
        "task_type": (None, "CAUSAL_LM"),
        "bias": (None, "none"),
        "init_lora_weights": _HARMLESS_INITS,
    }
    for setting, value in config.items():
        if setting in wanted:
            is_served = value in wanted[setting]
        else:
            is_served = setting in _READ | _NOT_NEEDED or not value
        if not is_served:
            rule = f"{setting}={json.dumps(value)[:64]} in its {_CONFIG} is not supported"
            raise ConfigError(key, given, rule, fix)
    return config


def _shapes(key: str, given: str, path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as e:
        raise ConfigError(key, given, f"its {WEIGHTS} is damaged: {e}", "save it again") from e


def _layers(
    key: str, given: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Layer]:
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found = _TENSOR.fullmatch(name)
        if found is None or len(shape) != 2 or ".experts." in name:
            rule = f"its {name} {list(shape)} is not a matrix A or B of a linear layer"
            fix = "merge it into its base (merge_and_unload), and serve that"
            raise ConfigError(key, given, rule, fix)
        sides.setdefault(found["layer"], {})[found["side"]] = shape
    if not sides:
        raise ConfigError(key, given, f"its {WEIGHTS} is empty", "save it again")
    layers = {}
    for layer, pair in sides.items():
        rank, scale = _rank_and_scale(key, given, config, layer)
        if set(pair) != {"A", "B"} or not pair["A"][0] == pair["B"][1] == rank:
            shown = ", ".join(f"{side} {list(shape)}" for side, shape in sorted(pair.items()))
            rule = f"{layer} has {shown}, but its {_CONFIG} says rank {rank}"
            raise ConfigError(key, given, rule, "save it again")
        layers[layer] = Layer(rank, pair["A"][1], pair["B"][0], scale)
    return layers


def _rank_and_scale(key: str, given: str, config: dict[str, Any], layer: str) -> tuple[int, float]:
    rank = _of_pattern(config.get("rank_pattern"), layer, config.get("r"))
    alpha = _of_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha"))
    for what, value in (("rank", rank), ("alpha", alpha)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or (what == "rank" and value < 1):
            rule = f"{layer} has {what} {value!r} in its {_CONFIG}"
            raise ConfigError(key, given, rule, "save it again")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the layer's name or its end.

    This is PEFT's rule (`peft.utils.other.get_pattern_key`).
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _digest(folder: Path) -> str:
    return digest_of({name: sha256_of(folder / name) for name in (_CONFIG, WEIGHTS)})
