"""Scores the importance of each part of a model, from the activations of the parent.

Heads and hidden channels: Minitron (Muralidharan et al., arXiv 2407.14679; 2408.11796), the mean
magnitude of activations over a sequence, then the l2 norm over sequences. MLP channels: the l2 norm
over both, so that a channel that is large for few tokens counts more, which costs less perplexity.
Blocks: ShortGPT (Men et al., arXiv 2403.03853), the angle by which a block turns the residual
stream.

Shapes: B sequences of T tokens, H hidden size, I intermediate size, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from compression.structured.family import Shape


class Scores:
    """Scores of one block, gathered by hooks while the loaded block of the parent runs.

    Args:
        block: Block of a model that `recognize` accepted.
        shape: Sizes of the model.
    """

    def __init__(self, block: Any, shape: Shape) -> None:
        self._sums: dict[str, Tensor] = {}
        self._shape = shape
        self._num_tokens = 0
        attention, mlp = block.self_attn, block.mlp
        norms = {"input": block.input_layernorm, "attention": block.post_attention_layernorm}
        self._handles = [
            mlp.down_proj.register_forward_pre_hook(self._on("mlp", _square)),
            attention.o_proj.register_forward_pre_hook(self._on("heads", self._per_head)),
        ]
        for name, norm in norms.items():
            self._handles += [
                norm.register_forward_pre_hook(self._on(f"{name}_power", _power)),
                norm.register_forward_hook(self._on_output(f"{name}_hidden")),
            ]

    def see(self, before: Tensor, after: Tensor) -> None:
        """Adds the block's input and output (B, T, H), after it ran."""
        self._num_tokens += before.shape[0] * before.shape[1]
        self._add("output_power", _power(after))
        self._add("depth", (1 - F.cosine_similarity(before, after, dim=-1)).sum())

    def finish(self) -> dict[str, Tensor]:
        """Removes the hooks and returns the scores.

        Returns:
            Scores by name, float32:
            `mlp` (I), `heads` (K), `hidden` (H): larger is more important; `hidden` is summed over
            the outputs of both norms, and is to be summed over blocks.
            `depth` (): 1 - cosine similarity of the block's input and output.
            `input_power`, `attention_power`, `output_power` (H): mean square of a channel of the
            residual stream, relative to its token's: the share of a norm that goes with it.
        """
        for handle in self._handles:
            handle.remove()
        # Query heads that share a key-value head stay or go together: their scores are added.
        sums = self._sums
        heads = sums["heads"].sqrt().unflatten(0, (self._shape.heads, -1)).sum(1)
        return {
            "mlp": sums["mlp"].sqrt(),
            "heads": heads,
            "hidden": sums["input_hidden"].sqrt() + sums["attention_hidden"].sqrt(),
        } | {
            name: sums[name] / self._num_tokens
            for name in ("input_power", "attention_power", "output_power", "depth")
        }

    def _per_head(self, x: Tensor) -> Tensor:
        return _magnitude(x.unflatten(-1, (-1, self._shape.head_dim)).norm(dim=-1))

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _on(
        self, name: str, reduce: Callable[[Tensor], Tensor]
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(name, reduce(args[0]))

        return hook

    def _on_output(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            self._add(name, _magnitude(output))

        return hook


def _magnitude(x: Tensor) -> Tensor:
    """Returns the square of each channel's score: (B, T, C) -> (C)."""
    return x.abs().mean(1).square().sum(0)


def _square(x: Tensor) -> Tensor:
    return x.square().sum((0, 1))


def _power(x: Tensor) -> Tensor:
    """Returns each channel's share of the mean square, summed over tokens: (B, T, C) -> (C)."""
    square = x.square()
    return (square / square.mean(-1, keepdim=True).clamp_min(1e-12)).sum((0, 1))
