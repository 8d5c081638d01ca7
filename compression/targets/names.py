"""What a model's tensors are called on disk, and how they lie there: as transformers saves them.

transformers converts names and shapes when it loads a model, and back when it saves one: its own
reverse conversion is what is asked here, so that an artifact is written as it would write it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from compression.experts import can_split, fuse, is_fused
from compression.layers import linear_layers

_SHAPE = (2, 3)  # of a probe: a matrix that came to lie otherwise has another one


class StoredNames:
    """Of a model.

    Attributes:
        linears: Its linear layers, on the meta device; see `linear_layers`.
        head: Its output head, which may be tied and then lies in no file.

    Args:
        folder: Its config.json says what it is built of.
    """

    def __init__(self, folder: Path) -> None:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        vars(config).pop("quantization_config", None)  # an artifact is named as its parent is
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(config)
        self.linears = linear_layers("", self._model)
        names = {module: name for name, module in self._model.named_modules()}
        self.head = names[self._model.get_output_embeddings()]
        modules = self._model.named_modules()
        self._fused = {name for name, m in modules if is_fused(m) and can_split(m)}

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors as they lie on disk.

        Args:
            tensors: By their names in memory, or those of `linear_layers`; of a layer's experts
                all, or none.
        """
        fused = fuse(tensors, self._fused)
        found: dict[str, Tensor] = revert_weight_conversion(self._model, fused)
        return found

    def fused(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same by their names in memory, which transformers loads, too."""
        return fuse(tensors, self._fused)

    def is_expert(self, layer: str) -> bool:
        """Whether a layer of `linear_layers` is a part of a fused parameter in memory."""
        return any(layer.startswith(f"{module}.") for module in self._fused)

    def matrix(self, layer: str) -> str | None:
        """Name on disk of a layer whose matrix lies there by itself, and as it is in memory."""
        return self._places[0].get(layer)

    def holders(self, layers: Collection[str]) -> set[str]:
        """Names on disk, without `.weight`, of what holds the matrices of some layers."""
        return {self._places[1][layer] for layer in layers}

    @cached_property
    def _places(self) -> tuple[dict[str, str], dict[str, str]]:
        """Of each layer: what is its matrix alone, and what holds it. Told by probes.

        Each layer's matrix is one number everywhere; which of them are where is seen on disk.
        """
        layers = list(self.linears)
        probes = {
            f"{layer}.weight": torch.full(_SHAPE, float(number))
            for number, layer in enumerate(layers)
        }
        alone: dict[str, str] = {}
        holders: dict[str, str] = {}
        for name, tensor in self.stored(probes).items():
            numbers = tensor.unique()
            for number in numbers.tolist():
                holders[layers[int(number)]] = name.removesuffix(".weight")
            if tuple(tensor.shape) == _SHAPE and len(numbers) == 1 and name.endswith(".weight"):
                alone[layers[int(numbers)]] = name.removesuffix(".weight")
        return alone, holders
