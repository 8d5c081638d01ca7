"""What is left of a layer makes up for the inputs that go.

SliceGPT and FLAP repair what they prune in closed form, too; this is the least-squares solution
that SparseGPT approaches a weight at a time.

Shapes: O outputs, I inputs of a layer, C inputs that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gram:
    """Adds up x x^T over all that a layer is given.

    Attributes:
        sum: (I, I) float32.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.sum = torch.zeros(layer.in_features, layer.in_features)
        self._handle = layer.register_forward_pre_hook(self._add)

    def finish(self) -> Tensor:
        """Takes the hook off; the sum."""
        self._handle.remove()
        return self.sum

    def _add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        self.sum.addmm_(rows.T, rows)


def refit(weight: Tensor, gram: Tensor, kept: Tensor, damping: float) -> Tensor:
    """A smaller weight whose output is closest to that of the whole.

    The least of `|X_C W'^T - X W^T|^2 + d |W' - W_C|^2`: inputs that are always zero change
    nothing when they go.

    Args:
        weight: (O, I) float32.
        gram: Sum of x x^T (I, I).
        kept: Places of the inputs that stay (C).
        damping: d, in shares of the mean squared input.

    Returns:
        (O, C) float32.
    """
    goes = torch.ones(weight.shape[1], dtype=torch.bool)
    goes[kept] = False
    to_kept = gram[:, kept]  # (I, C)
    damped = to_kept[kept].double()
    damped.diagonal().add_(damping * gram.diagonal().double().mean().clamp_min(1e-12))
    lost = (weight[:, goes] @ to_kept[goes]).double()  # (O, C)
    made_up = torch.cholesky_solve(lost.T, torch.linalg.cholesky(damped)).T
    return weight[:, kept] + made_up.float()
