"""Grids that clip a little: what a few large weights lose, all the others gain in resolution."""

from __future__ import annotations

import torch
from torch import Tensor

from compression.grid import Grid, fit_grid
from compression.scheme import Number, Scheme

_SHRINKS = tuple(1.0 - 0.02 * step for step in range(1, 21))  # kept shares of a group's range


def clipped_grid(weight: Tensor, importance: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The grid on which each group's weighted rounding error is least.

    Args:
        weight: (O, I).
        importance: Of an error in each input's weight: its mean square (I).
        scheme: Of the grid.
        dtype: See `fit_grid`.
    """
    best = fit_grid(weight, scheme, dtype)
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
