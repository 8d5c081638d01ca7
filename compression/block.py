"""A decoder block in the hands of a method: its layers, and what flows into them.

Shapes: O outputs and I inputs of a linear layer, B sequences of T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compression.grid import Quantized


@dataclass
class Block:
    """A loaded block and what became of it so far; methods change its weights in place.

    Attributes:
        name: As `model.layers.0`.
        module: Float32, on the CPU.
        layers: The linear layers that the recipe is for, by full name.
        inputs: Batches of what the block is given, from the start each time (B, T, H).
        run: The block's output for a batch.
        dtype: In which the artifact holds what is not quantized.
        quantized: Layers in codes, by full name.
        notes: What a method did with a layer, for the report.
        scales_in: In which it holds scales; None: `dtype`.
    """

    name: str
    module: nn.Module
    layers: dict[str, nn.Linear]
    inputs: Callable[[], Iterator[Tensor]]
    run: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    quantized: dict[str, Quantized] = field(default_factory=dict)
    notes: dict[str, dict[str, object]] = field(default_factory=dict)
    scales_in: torch.dtype | None = None

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of scales."""
        return self.scales_in or self.dtype

    def note_tokens(self, seen: list[Inputs]) -> None:
        """Notes how many tokens reached each layer: an expert sees those that are routed to it."""
        found = {name: inputs.num_tokens for inputs in seen for name in inputs.names}
        for name, layer in self.layers.items():
            counts = {"calibration_tokens": found.get(name, 0), "inputs": layer.in_features}
            self.notes.setdefault(name, {}).update(counts)

    def put(self, name: str, quantized: Quantized, **note: object) -> None:
        """A layer's weight becomes what its codes stand for."""
        self.quantized[name] = quantized
        self.layers[name].weight.data = quantized.dequantize()
        self.notes.setdefault(name, {}).update(note)


@dataclass(frozen=True)
class Inputs:
    """What flowed into layers that share an input.

    Attributes:
        names: Full names of the layers.
        feeder: Name, inside the block, of the module whose output it is; None: an activation of
            several.
        gram: Mean of x x^T over tokens (I, I).
        largest: Of each input, the largest magnitude (I).
        mean: Of each input, the mean magnitude (I).
        num_tokens: That they are of.
    """

    names: tuple[str, ...]
    feeder: str | None
    gram: Tensor
    largest: Tensor
    mean: Tensor
    num_tokens: int


@torch.no_grad()
def watch_inputs(block: Block) -> list[Inputs]:
    """Runs all batches through the block and gathers what flows into its layers.

    Layers that are given the same tensor share one entry, so that a block of the usual kind keeps
    four Gram matrices. A layer that saw nothing (an expert without tokens) is in none.
    """
    watch = _Watch(block)
    try:
        for batch in block.inputs():
            watch.begin()
            block.run(batch)
    finally:
        watch.remove()
    seen = watch.results()
    block.note_tokens(seen)
    return seen


class _Watch:
    """Hooks on the layers of a block, and on what may feed them."""

    def __init__(self, block: Block) -> None:
        self._leader: dict[str, str] = {}  # of each layer: the first that was given its input
        self._feeder: dict[str, str | None] = {}
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._given: dict[tuple[int, torch.Size], str] = {}
        self._made: dict[int, str] = {}
        self._keep: list[Tensor] = []  # an address names a tensor only while it lives
        layers = set(block.layers.values())
        self._handles = [
            layer.register_forward_pre_hook(self._on_input(name))
            for name, layer in block.layers.items()
        ]
        for name, module in block.module.named_modules():
            if module not in layers and name and not any(True for _ in module.children()):
                self._handles.append(module.register_forward_hook(self._on_output(name)))

    def begin(self) -> None:
        """A new batch."""
        self._given.clear()
        self._made.clear()
        self._keep.clear()

    def remove(self) -> None:
        """Takes the hooks off."""
        self.begin()
        for handle in self._handles:
            handle.remove()

    def results(self) -> list[Inputs]:
        """An entry for each input that was seen."""
        found = []
        for leader, (gram, largest, total) in self._sums.items():
            names = tuple(name for name, first in self._leader.items() if first == leader)
            count = self._counts[leader]
            means = gram / count, largest, total / count
            found.append(Inputs(names, self._feeder[leader], *means, count))
        return found

    def _on_input(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            leader = self._given.setdefault((x.data_ptr(), x.shape), name)
            if self._leader.setdefault(name, leader) != name:
                return
            self._keep.append(x)
            self._feeder.setdefault(name, self._made.get(x.data_ptr()))
            rows = x.flatten(0, -2).float()  # (N, I)
            if name not in self._sums:
                size = rows.shape[1]
                zeros = torch.zeros(size, size), torch.zeros(size), torch.zeros(size)
                self._sums[name], self._counts[name] = zeros, 0
            gram, largest, total = self._sums[name]
            gram.addmm_(rows.T, rows)
            magnitude = rows.abs()
            torch.maximum(largest, magnitude.amax(0), out=largest)
            total += magnitude.sum(0)
            self._counts[name] += len(rows)

        return hook

    def _on_output(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor):
                self._made[output.data_ptr()] = name
                self._keep.append(output)

        return hook


def output_error(change: Tensor, gram: Tensor) -> float:
    """Mean squared change of a layer's output for a change of its weight.

    Args:
        change: (O, I).
        gram: Mean of x x^T (I, I).
    """
    return float(((change @ gram) * change).sum()) / change.shape[0]
