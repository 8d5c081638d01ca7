"""Grids that clip the largest weights of a group, so that all others are rounded more finely."""

from __future__ import annotations

import torch
from torch import Tensor

from compression.quantizer import Grid, fit_grid
from compression.scheme import Number, Scheme

_SHRINKS = tuple(1.0 - 0.02 * step for step in range(1, 21))  # shares of a group's range to try


def clipped_grid(weight: Tensor, importance: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """Returns the grid for which the weighted rounding error of each group is smallest.

    Args:
        weight: Weight matrix (O, I).
        importance: Mean square of each input (I), by which the errors of its weights are weighted.
        scheme: Scheme of the grid.
        dtype: Type of scales, see `fit_grid`.
    """
    best = fit_grid(weight, scheme, dtype)
    # A float rounds relative to its size: clipping would not help the others.
    if scheme.number is Number.float8:
        return best
    groups = scheme.groups(weight.shape[1])

    def error(grid: Grid) -> Tensor:  # (O, G)
        squares = (grid.quantize(weight).dequantize() - weight).square_() * importance
        return squares.view(len(weight), groups, -1).sum(-1)

    least = error(best)
    shrink = torch.ones_like(least)
    for candidate in _SHRINKS:
        found = error(fit_grid(weight, scheme, dtype, candidate))
        shrink = torch.where(found < least, candidate, shrink)
        least = torch.minimum(found, least)
    return fit_grid(weight, scheme, dtype, shrink)
