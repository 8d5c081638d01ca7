"""Finds the weights of a Hugging Face folder or hub repository, and reads what they are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from core.errors import ConfigError, DamagedError
from trainer.model_config import PathModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def find_file(config: PathModelConfig, name: str) -> str | None:
    """Returns the path of a file in the folder or hub repository; None if it does not exist."""
    path: str | None = cached_file(
        config.path, name, revision=config.revision, _raise_exceptions_for_missing_entries=False
    )
    return path


def weight_files(config: PathModelConfig) -> dict[str, str]:
    """Returns the file of each stored tensor; as in transformers, a single file precedes an index.

    Raises:
        ConfigError: There are no safetensors, or one of several files is missing.
        DamagedError: The file or the index cannot be read.
    """
    single = find_file(config, SINGLE)
    if single is not None:
        return dict.fromkeys(_names_in(config, single), single)
    index = find_file(config, INDEX)
    if index is None:
        raise ConfigError(
            "model.path",
            config.path,
            f"has neither {SINGLE} nor {INDEX}",
            "save the model as safetensors, or use model=config for random weights",
        )
    try:
        weight_map: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DamagedError(
            "model.path", config.path, f"{INDEX} has no weight_map", "download it again"
        ) from e
    files: dict[str, str] = {}
    for shard in shards:  # as in transformers, the files' content counts, not the index's
        path = find_file(config, shard)
        if path is None:
            raise ConfigError("model.path", config.path, f"{shard} is missing", "download it again")
        files |= dict.fromkeys(_names_in(config, path), path)
    return files


def _names_in(config: PathModelConfig, path: str) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as e:
        line = str(e).strip().split("\n")[0].rstrip(".")
        rule = f"{Path(path).name} cannot be read: {line}"
        raise DamagedError("model.path", config.path, rule, "download or export it again") from e


def described_weights(config: PathModelConfig, files: dict[str, str]) -> dict[str, Tensor]:
    """Returns shape and type of each stored tensor, as tensors on the meta device."""
    described: dict[str, Tensor] = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                piece = file.get_slice(name)
                dtype = _DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise ConfigError(
                        "model.path",
                        config.path,
                        f"{name} is of type {piece.get_dtype()}, which no model is trained in",
                        "give the model that it was made from",
                    )
                described[name] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
    return described
