"""GPTQ (Frantar et al., arXiv 2210.17323): later weights compensate for rounding errors.

The columns of the largest inputs are rounded first, on grids that were fitted to the groups before
("static groups" of the authors' code), so that the artifact needs no permutation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compression.block import Block, output_error, watch_inputs
from compression.methods.clipping import clipped_grid
from compression.quantizer import Grid, code_range, fit_grid
from compression.scheme import Scheme

_BLOCK = 128  # columns after which errors are passed on to all later columns at once
_MORE_DAMPING = 10.0  # factor on the damping if a Gram matrix cannot be inverted


@dataclass(frozen=True)
class Gptq:
    """Second-order rounding of each layer by itself; plain rounding if that has the lower error.

    Attributes:
        scheme: Scheme of the grid.
        damping: Share of the mean diagonal that is added to the Gram matrix's diagonal.
        schemes: Schemes of layers that differ from `scheme`, by full name.
    """

    scheme: Scheme
    damping: float
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    needs_data = True

    def apply(self, block: Block) -> None:
        """Quantizes the block's layers in place."""
        for inputs in watch_inputs(block):
            for name in inputs.names:
                weight, scheme = block.layers[name].weight.data, self._scheme_of(name)
                rounded = fit_grid(weight, scheme, block.scale_dtype).quantize(weight)
                error = output_error(rounded.dequantize() - weight, inputs.gram)
                best, method, rounding_error = rounded, "rounding", error
                grid = clipped_grid(weight, inputs.gram.diagonal(), scheme, block.scale_dtype)
                codes = gptq_codes(weight, inputs.gram, grid, self.damping)
                if codes is not None:
                    # The grid was clipped for plain rounding, and the damping is a guess: both can
                    # lose.
                    found = grid.of(codes)
                    found_error = output_error(found.dequantize() - weight, inputs.gram)
                    if found_error < error:
                        best, method, error = found, "gptq", found_error
                block.put(name, best, method=method, error=error, rounding_error=rounding_error)
        # Experts that no token reached have no Gram matrix.
        for name in block.layers.keys() - block.quantized.keys():
            weight = block.layers[name].weight.data
            grid = fit_grid(weight, self._scheme_of(name), block.scale_dtype)
            block.put(name, grid.quantize(weight), method="rounding")

    def _scheme_of(self, name: str) -> Scheme:
        return self.schemes.get(name, self.scheme)


def gptq_codes(weight: Tensor, gram: Tensor, grid: Grid, damping: float) -> Tensor | None:
    """Returns codes for which a layer's output is close to that of its weight.

    A weight of exactly zero keeps the value zero, so that a pruned model stays pruned.

    Args:
        weight: Weight matrix (O, I) float32; it is not changed.
        gram: Mean of x x^T over the layer's inputs (I, I).
        grid: Grid of the codes.
        damping: Damping, see `Gptq`.

    Returns:
        Codes (O, I) int8; None if the Gram matrix cannot be inverted with any damping.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    inverse = inverse_factor(gram[order][:, order], damping)
    if inverse is None:
        return None
    num_inputs = weight.shape[1]
    scales, zero_points = grid.columns(0, num_inputs)
    scales = scales[:, order]
    zero_points = torch.zeros_like(scales) if zero_points is None else zero_points[:, order]
    low, high = code_range(grid.scheme.bits)
    left = weight[:, order].clone()  # weights after the compensation so far
    is_zero = left == 0
    codes = torch.empty_like(left)
    for start in range(0, num_inputs, _BLOCK):
        stop = min(start + _BLOCK, num_inputs)
        errors = torch.empty(len(left), stop - start)
        for i in range(start, stop):
            column = left[:, i].masked_fill(is_zero[:, i], 0.0)
            code = (column / scales[:, i] + zero_points[:, i]).round_().clamp_(low, high)
            codes[:, i] = code
            error = left[:, i] - (code - zero_points[:, i]) * scales[:, i]
            # Row i of the factor says how later columns compensate for the error of column i.
            error /= inverse[i, i]
            left[:, i:stop] -= error.unsqueeze(1) * inverse[i, i:stop]
            errors[:, i - start] = error
        # Columns beyond the block are updated once a block: one product instead of many (the
        # paper's lazy batch updates).
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes[:, order.argsort()].to(torch.int8)


def inverse_factor(gram: Tensor, damping: float) -> Tensor | None:
    """Returns the upper Cholesky factor of the inverse of a damped Gram matrix (I, I).

    None: the matrix cannot be inverted even with a hundred times the damping.
    """
    gram = gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0  # an input that is always zero: its weights do not matter
    mean = gram.diagonal().mean()
    for _ in range(3):
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
        damping *= _MORE_DAMPING
    return None
