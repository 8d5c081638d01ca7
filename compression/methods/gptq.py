"""GPTQ (Frantar et al., arXiv 2210.17323): rounding errors are made up for by later weights.

The columns of largest input go first, on grids that were fitted to the groups beforehand ("static
groups" of the authors' code), so that the artifact needs no permutation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compression.block import Block, output_error, watch_inputs
from compression.grid import Grid, code_range, fit_grid
from compression.methods.clipping import clipped_grid
from compression.scheme import Scheme

_BLOCK = 128  # columns whose errors are passed on at once
_MORE_DAMPING = 10.0


@dataclass(frozen=True)
class Gptq:
    """Second-order rounding of each layer by itself; a layer that it makes worse is rounded.

    Attributes:
        scheme: Of the grid.
        damping: Share of the mean diagonal that is added to the Gram matrix's.
        schemes: Of layers that have another one, by full name.
    """

    scheme: Scheme
    damping: float
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    needs_data = True

    def apply(self, block: Block) -> None:
        """Quantizes the block's layers."""
        for inputs in watch_inputs(block):
            for name in inputs.names:
                weight, scheme = block.layers[name].weight.data, self._scheme_of(name)
                rounded = fit_grid(weight, scheme, block.scale_dtype).quantize(weight)
                error = output_error(rounded.dequantize() - weight, inputs.gram)
                best, method, rounding_error = rounded, "rounding", error
                grid = clipped_grid(weight, inputs.gram.diagonal(), scheme, block.scale_dtype)
                codes = gptq_codes(weight, inputs.gram, grid, self.damping)
                if codes is not None:
                    found = grid.of(codes)
                    found_error = output_error(found.dequantize() - weight, inputs.gram)
                    if found_error < error:
                        best, method, error = found, "gptq", found_error
                block.put(name, best, method=method, error=error, rounding_error=rounding_error)
        for name in block.layers.keys() - block.quantized.keys():  # saw no token
            weight = block.layers[name].weight.data
            grid = fit_grid(weight, self._scheme_of(name), block.scale_dtype)
            block.put(name, grid.quantize(weight), method="rounding")

    def _scheme_of(self, name: str) -> Scheme:
        return self.schemes.get(name, self.scheme)


def gptq_codes(weight: Tensor, gram: Tensor, grid: Grid, damping: float) -> Tensor | None:
    """Codes whose layer output is close to that of a weight.

    A weight of exactly zero stays zero, so that a pruned model stays pruned.

    Args:
        weight: (O, I) float32; is not changed.
        gram: Mean of x x^T (I, I).
        grid: Of the codes.
        damping: See `Gptq`.

    Returns:
        (O, I) int8; None where the Gram matrix cannot be inverted, whatever the damping.
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
    left = weight[:, order].clone()  # weights, with the errors so far made up for
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
            error /= inverse[i, i]
            left[:, i:stop] -= error.unsqueeze(1) * inverse[i, i:stop]
            errors[:, i - start] = error
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes[:, order.argsort()].to(torch.int8)


def inverse_factor(gram: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor of the inverse of a damped Gram matrix (I, I); None: there is none."""
    gram = gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0  # an input that is always zero: any code will do
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
