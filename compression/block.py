"""A decoder block as a compression method sees it: its layers and the inputs that reach them.

Shapes: O outputs and I inputs of a linear layer, B sequences of T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compression.quantizer import Quantized


@dataclass
class Block:
    """A loaded decoder block and its compressed layers so far; methods change its weights in place.

    Attributes:
        name: Full name of the block, such as `model.layers.0`.
        module: The block itself, in float32 on the CPU.
        layers: Linear layers that the recipe applies to, by full name.
        inputs: Function that iterates over the block's input batches (B, T, H), from the start on
            each call.
        run: Function that returns the block's output for a batch.
        dtype: Type in which the artifact stores what is not quantized.
        quantized: Quantized layers, by full name.
        notes: Facts about each layer that methods record for the report.
        scales_in: Type in which the artifact stores scales; None: `dtype`.
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
        """Type in which the artifact stores scales."""
        return self.scales_in or self.dtype

    def note_tokens(self, seen: list[Inputs]) -> None:
        """Records how many tokens reached each layer; an expert sees only those routed to it."""
        found = {name: inputs.num_tokens for inputs in seen for name in inputs.names}
        for name, layer in self.layers.items():
            counts = {"calibration_tokens": found.get(name, 0), "inputs": layer.in_features}
            self.notes.setdefault(name, {}).update(counts)

    def put(self, name: str, quantized: Quantized, **note: object) -> None:
        """Replaces a layer's weight by the values that its codes stand for, and records notes."""
        self.quantized[name] = quantized
        self.layers[name].weight.data = quantized.dequantize()
        self.notes.setdefault(name, {}).update(note)


@dataclass(frozen=True)
class Inputs:
    """Statistics of one input that one or more layers share.

    Attributes:
        names: Full names of the layers.
        feeder: Name, inside the block, of the module whose output the input is; None if no single
            module made it, such as a product of two activations.
        gram: Mean of x x^T over all tokens (I, I).
        largest: Largest magnitude of each input channel (I).
        mean: Mean magnitude of each input channel (I).
        num_tokens: Number of tokens that the statistics cover.
    """

    names: tuple[str, ...]
    feeder: str | None
    gram: Tensor
    largest: Tensor
    mean: Tensor
    num_tokens: int


@torch.no_grad()
def watch_inputs(block: Block) -> list[Inputs]:
    """Runs all batches through the block and returns statistics of its layers' inputs.

    Layers that receive the same tensor share one entry, so that an ordinary block needs four Gram
    matrices. A layer that received no token (an unused expert) is in no entry.
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
    """Hooks on the layers of a block, and on the modules that may make their inputs."""

    def __init__(self, block: Block) -> None:
        self._leader: dict[str, str] = {}  # layer -> the first layer that received the same input
        self._feeder: dict[str, str | None] = {}
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._given: dict[tuple[int, torch.Size], str] = {}
        self._made: dict[int, str] = {}
        # Tensors are told apart by their address, which names a tensor only while it is alive: all
        # tensors of a batch are held until the next batch begins.
        self._keep: list[Tensor] = []
        layers = set(block.layers.values())
        self._handles = [
            layer.register_forward_pre_hook(self._on_input(name))
            for name, layer in block.layers.items()
        ]
        # Norms and activations may make an input. A container hands on the output of a module
        # inside it, and would be noted instead.
        for name, module in block.module.named_modules():
            if module not in layers and name and not any(True for _ in module.children()):
                self._handles.append(module.register_forward_hook(self._on_output(name)))

    def begin(self) -> None:
        """Forgets the tensors of the last batch."""
        self._given.clear()
        self._made.clear()
        self._keep.clear()

    def remove(self) -> None:
        """Removes the hooks."""
        self.begin()
        for handle in self._handles:
            handle.remove()

    def results(self) -> list[Inputs]:
        """Returns an entry for each input that was seen."""
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
            # Layers with the same input would add the same Gram matrix: only the first of them
            # does.
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
    """Returns the mean squared change of a layer's output for a change of its weight.

    Args:
        change: Difference of two weights (O, I).
        gram: Mean of x x^T over the layer's inputs (I, I).
    """
    return float(((change @ gram) * change).sum()) / change.shape[0]
