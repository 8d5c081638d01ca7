"""The model to compress: a Hugging Face folder that is checked before any work."""

from __future__ import annotations

import difflib
import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from compression.layers import other_matrices
from compression.recipe import BlockStep, PruneConfig
from compression.sparsity import Pattern
from compression.stream import BlockStream
from core import layout
from core.errors import ConfigError, DamagedError
from core.folder import sha256_of
from trainer.data.tokenizer import fingerprint, load_tokenizer

_PIECE = 2**22  # elements of a tensor that are checked at once
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Source:
    """A folder of a dense causal language model.

    Attributes:
        folder: The folder.
        lineage: Content of its `lineage.json`; None if it is not an export of ours.
        digests: SHA-256 of each file that decides what the model computes.
    """

    folder: Path
    lineage: dict[str, Any] | None
    digests: dict[str, str]

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Reads and checks a folder.

        Raises:
            ConfigError: The folder holds no model, or one that is quantized already.
            DamagedError: Its files are not those that its lineage lists.
        """
        config_file = folder / "config.json"
        if not config_file.is_file():
            fix = "give a Hugging Face folder, or run=runs/<name> after an export"
            raise ConfigError("model", folder, "has no config.json", fix)
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            quantization = config.get("quantization_config")
        except (ValueError, AttributeError) as e:
            raise ConfigError("model", config_file, "is not JSON", "save the model again") from e
        if quantization is not None:
            method = quantization.get("quant_method", "unknown")
            fix = "compress the model that it was made from, or load it with transformers, "
            fix += "dequantize it and save it"
            raise ConfigError("model", folder, f"is quantized already ({method})", fix)
        if not any(folder.glob("*.safetensors")):
            packed = next(folder.glob("*.gguf"), None) or next(folder.glob("openvino*"), None)
            rule = "has no safetensors" if packed is None else f"is packed already ({packed.name})"
            fix = "load it with transformers and save it again"
            if packed is not None:
                fix = "compress the model that it was made from"
            raise ConfigError("model", folder, rule, fix)
        # The index counts as well: it decides which file a weight is read from.
        files = [p for pattern in (*_WEIGHTS, "config.json") for p in folder.glob(pattern)]
        digests = {path.name: sha256_of(path) for path in sorted(files)}
        _check_numbers(folder)
        lineage = None
        if (folder / layout.LINEAGE).is_file():
            lineage = json.loads((folder / layout.LINEAGE).read_text(encoding="utf-8"))
            for name, digest in digests.items():
                listed = lineage["files"].get(name)
                if listed is None or listed["sha256"] != digest:
                    rule = f"{name} is not as lineage.json lists it"
                    raise DamagedError("model", folder, rule, "export it again")
        return cls(folder, lineage, digests)

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the model's tokenizer."""
        return fingerprint(load_tokenizer(str(self.folder)))


def _check_numbers(folder: Path) -> None:
    """Raises ConfigError for weights that are NaN or infinite, which make any result worthless."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    # A sum is not finite if one of its terms is not; pieces take little memory. In
                    # double, so that the sum of finite weights does not overflow.
                    pieces = file.get_tensor(name).flatten().split(_PIECE)
                    if not all(piece.double().sum().isfinite() for piece in pieces):
                        rule = f"{name} is NaN or infinite in places"
                        raise ConfigError("model", folder, rule, "export an earlier checkpoint")
        except SafetensorError:
            return  # a truncated file: the reader of the weights reports it


def choose_layers(stream: BlockStream, include: list[str], exclude: list[str]) -> dict[str, int]:
    """Returns the linear layers to compress by full name, with the number of their block.

    Args:
        stream: Stream of the model.
        include: Patterns of names, such as `*.mlp.*`; a layer that matches one is chosen ...
        exclude: ... unless it matches one of these patterns.

    Raises:
        ConfigError: A pattern matches nothing, no layer is left, or a chosen module is not built
            of linear layers.
    """
    found = {name: i for i in range(len(stream.blocks)) for name in stream.layers(i)}
    size = stream.model.config.get_text_config().hidden_size
    others: dict[str, tuple[int, nn.Module]] = {}
    for index, (name, block) in enumerate(zip(stream.names, stream.blocks, strict=True)):
        matrices = other_matrices(name, block, size)
        others |= {other: (index, module) for other, module in matrices.items()}
    if not found:
        kinds = ", ".join(sorted({type(module).__name__ for _, module in others.values()}))
        rule = f"{type(stream.model).__name__} has no linear layers in its decoder blocks"
        rule += f", but {kinds}" if kinds else ""
        raise ConfigError("model", stream.model.config.model_type, rule, "choose another model")
    if not include:
        raise ConfigError("layers.include", "[]", "chooses no layer", "use ['*']")
    every = [*found, *others]
    for key, patterns in (("layers.include", include), ("layers.exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(every, pattern):
                near = difflib.get_close_matches(pattern, found, n=1, cutoff=0.0)
                rule = "matches no linear layer of a decoder block"
                raise ConfigError(key, pattern, rule, f"there is {near[0]}, for one")

    def is_chosen(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in include) and not any(
            fnmatch.fnmatchcase(name, pattern) for pattern in exclude
        )

    foreign = next((name for name in others if is_chosen(name)), None)
    if foreign is not None:
        kind = type(others[foreign][1]).__name__
        last = {name.rpartition(".")[2] for name in others if is_chosen(name)}
        rule = f"{foreign} is a {kind} without linear layers, which no recipe can change"
        leave = ",".join(f"'*.{name}'" for name in sorted(last))
        fix = f"leave them as they are with layers.exclude=[{leave}]"
        raise ConfigError("layers.include", include, rule, fix)
    chosen = {name: index for name, index in found.items() if is_chosen(name)}
    if not chosen:
        raise ConfigError("layers.exclude", exclude, "leaves no layer", "exclude less")
    return chosen


def check_shapes(stream: BlockStream, layers: dict[str, int], key: str, step: BlockStep) -> None:
    """Raises ConfigError for a layer whose inputs cannot be divided into the groups of a step.

    Args:
        stream: Stream of the model.
        layers: Layers that the step changes.
        key: Key of the step, for errors.
        step: Settings of the step.
    """
    if isinstance(step, PruneConfig):
        if step.pattern is Pattern.unstructured:
            return
        size, setting = step.pattern.kept_of[1], f"{key}.pattern"
    elif step.group_size is None:
        return
    else:
        size, setting = step.group_size, f"{key}.group_size"
    widths = {name: layer.in_features for name, layer in stream.chosen(layers).items()}
    odd = next((name for name, width in widths.items() if width % size), None)
    if odd is None:
        return
    # Offers the largest size that fits all chosen layers, if there is one.
    fit = [s for s in (256, 128, 64, 32, 16, 8) if not any(w % s for w in widths.values())]
    pattern = "*." + odd.rpartition(".")[2]
    fix = f"leave it out with layers.exclude=['{pattern}']"
    if fit and setting.endswith("group_size"):
        fix = f"use {fit[0]}, or {fix}"
    rule = f"does not divide the {widths[odd]} inputs of {odd}"
    raise ConfigError(setting, size, rule, fix)
