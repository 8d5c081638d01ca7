"""A compressed model before it is packed: a folder with a safetensors file for each decoder block.

block-00000.safetensors   <layer>.weight.codes, .scales, .zero_points; other tensors unchanged
rest.safetensors          tensors outside the blocks
The metadata of each file holds schemes and notes by layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compression.block import Block
from compression.quantizer import Quantized, round_activation
from compression.scheme import Activation, Scheme
from core.folder import staged_file

REST = "rest.safetensors"
_CODES, _SCALES, _ZERO_POINTS = ".codes", ".scales", ".zero_points"


@dataclass(frozen=True)
class Result:
    """A folder that holds a compressed model, as described above.

    Attributes:
        folder: The folder.
        dtype: Type of tensors that are not quantized.
        scales_in: Type in which artifacts store scales; None: `dtype`.
    """

    folder: Path
    dtype: torch.dtype
    scales_in: torch.dtype | None = None

    def block_file(self, index: int) -> Path:
        """Returns the file of a block, which exists only when it is complete."""
        return self.folder / f"block-{index:05d}.safetensors"

    def num_done(self) -> int:
        """Returns the number of complete blocks from the first one on."""
        index = 0
        while self.block_file(index).exists():
            index += 1
        return index

    def write_block(self, index: int, block: Block) -> None:
        """Writes a block and its notes in one step."""
        tensors: dict[str, Tensor] = {}
        metadata = {"notes": json.dumps(block.notes), "schemes": "{}"}
        schemes = {}
        for local, tensor in persistent_tensors(block.module).items():
            name = f"{block.name}.{local}"
            quantized = block.quantized.get(name.removesuffix(".weight"))
            if quantized is None or not local.endswith(".weight"):
                tensors[name] = self.cast(tensor)
                continue
            schemes[name.removesuffix(".weight")] = quantized.scheme.describe()
            tensors[name + _CODES] = quantized.codes.contiguous()
            tensors[name + _SCALES] = quantized.scales.contiguous()
            if quantized.zero_points is not None:
                tensors[name + _ZERO_POINTS] = quantized.zero_points.contiguous()
        metadata["schemes"] = json.dumps(schemes)
        self._write(self.block_file(index), tensors, metadata)

    def cast(self, tensor: Tensor) -> Tensor:
        """Returns an unquantized tensor as it is stored; integer tensors keep their type."""
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(dtype).contiguous()

    def write_rest(self, tensors: dict[str, Tensor]) -> None:
        """Writes the tensors outside the blocks."""
        cast = {name: self.cast(tensor) for name, tensor in tensors.items()}
        self._write(self.folder / REST, cast, {})

    def files(self) -> list[Path]:
        """Returns the files of all tensors: the blocks in order, then the rest."""
        return [*(self.block_file(i) for i in range(self.num_done())), self.folder / REST]

    def schemes(self) -> dict[str, Scheme]:
        """Returns the scheme of each quantized layer."""
        found: dict[str, Scheme] = {}
        for path in self.files()[:-1]:
            for name, described in _metadata(path, "schemes").items():
                found[name] = Scheme.parse(described)
        return found

    def notes(self) -> dict[str, dict[str, object]]:
        """Returns the notes that methods recorded for each layer."""
        found: dict[str, dict[str, object]] = {}
        for path in self.files()[:-1]:
            found |= _metadata(path, "notes")
        return found

    def read(self, path: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Yields the content of one file: `name.weight` with its tensor, or with its codes."""
        schemes = _metadata(path, "schemes")
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names):
                if name.endswith(_CODES):
                    weight = name.removesuffix(_CODES)
                    zeros = weight + _ZERO_POINTS
                    yield (
                        weight,
                        Quantized(
                            Scheme.parse(schemes[weight.removesuffix(".weight")]),
                            file.get_tensor(name),
                            file.get_tensor(weight + _SCALES),
                            file.get_tensor(zeros) if zeros in names else None,
                        ),
                    )
                elif not name.endswith((_SCALES, _ZERO_POINTS)):
                    yield name, file.get_tensor(name)

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        """File of each weight, once all blocks are written."""
        return {name: path for path in self.files() for name in _stored(path)}

    def put_into(self, name: str, part: nn.Module) -> None:
        """Puts this model's weights into a part of the dense model, whose layers then round inputs.

        Args:
            name: Full name of the part.
            part: Part of the dense model, with its weights loaded.
        """
        parameters = {f"{name}.{local}": p for local, p in persistent_tensors(part).items()}
        modules = {f"{name}.{local}" if local else name: m for local, m in part.named_modules()}
        for path in sorted({self._file_of[n] for n in parameters if n in self._file_of}):
            for weight, value in self.read(path):
                if weight not in parameters:
                    continue
                if isinstance(value, Quantized):
                    parameters[weight].data = value.dequantize()
                    round_inputs(modules[weight.removesuffix(".weight")], value.scheme.activation)
                else:
                    parameters[weight].data = value.to(parameters[weight].dtype)

    def _write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        with staged_file(path) as staging:
            save_file(tensors, staging, {"format": "pt", **metadata})


def persistent_tensors(module: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Returns the parameters and buffers that belong to a model's files, by name.

    Args:
        module: Module to look in.
        recurse: Includes the modules below it.
    """
    # Not `state_dict`: its values are detached, and callers replace `.data` of the tensors in
    # place.
    modules = module.named_modules() if recurse else [("", module)]
    return {
        f"{name}.{local}" if name else local: tensor
        for name, part in modules
        for local, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None and local not in part._non_persistent_buffers_set
    }


def round_inputs(layer: nn.Module, activation: Activation) -> None:
    """Makes a layer round its input as the artifact's kernel does, from now on."""
    if activation is not Activation.none:
        layer.register_forward_pre_hook(lambda _, args: (round_activation(args[0], activation),))


def _metadata(path: Path, key: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads((file.metadata() or {}).get(key, "{}"))
        return found


def _stored(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return {name.removesuffix(_CODES) for name in file.keys()}
