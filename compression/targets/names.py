"""Names and shapes of a model's tensors on disk, as transformers saves them.

transformers converts names and shapes when it loads a model, and back when it saves one: its own
reverse conversion is used here, so that an artifact is written as transformers would write it.
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

_SHAPE = (2, 3)  # shape of a probe: one that was merged or transposed has another shape


class StoredNames:
    """Names of one model's tensors on disk.

    Attributes:
        linears: Linear layers of the model, on the meta device; see `linear_layers`.
        head: Name of the output head; a tied head is in no file.

    Args:
        folder: Folder of the model, of which config.json is read.
    """

    def __init__(self, folder: Path) -> None:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        vars(config).pop("quantization_config", None)  # an artifact has the names of its parent
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(config)
        self.linears = linear_layers("", self._model)
        names = {module: name for name, module in self._model.named_modules()}
        self.head = names[self._model.get_output_embeddings()]
        modules = self._model.named_modules()
        self._fused = {name for name, m in modules if is_fused(m) and can_split(m)}

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns dense tensors by name and shape as on disk.

        Args:
            tensors: Tensors by their names in memory, or by those of `linear_layers`; all matrices
                of a layer's experts, or none of them.
        """
        fused = fuse(tensors, self._fused)
        found: dict[str, Tensor] = revert_weight_conversion(self._model, fused)
        return found

    def fused(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns dense tensors by their names in memory, which transformers loads as well."""
        return fuse(tensors, self._fused)

    def is_expert(self, layer: str) -> bool:
        """Returns whether a layer of `linear_layers` is part of a fused parameter in memory."""
        return any(layer.startswith(f"{module}.") for module in self._fused)

    def matrix(self, layer: str) -> str | None:
        """Returns the name on disk of a layer's matrix; None if it is fused or changed there."""
        return self._places[0].get(layer)

    def holders(self, layers: Collection[str]) -> set[str]:
        """Returns the names on disk, without `.weight`, of tensors with some layers' matrices."""
        return {self._places[1][layer] for layer in layers}

    @cached_property
    def _places(self) -> tuple[dict[str, str], dict[str, str]]:
        """Names on disk of each layer's own matrix, and of the tensor that holds it.

        They are found by probes: the matrix of each layer is filled with the layer's number, and
        the numbers in a stored tensor tell which matrices it holds.
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
