"""Converts weights to codes on a quantization grid, and back.

Shapes: O outputs, I inputs, G groups of a row, S = I / G inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.scheme import Activation, Number, Scheme

FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = torch.finfo(FLOAT8).max
_SMALLEST = 1e-12  # a scale of 0 would divide a group of zeros by 0


@dataclass(frozen=True)
class Quantized:
    """A quantized weight matrix: `weight = (codes - zero_points) * scales`.

    Attributes:
        scheme: Meaning of the codes.
        codes: Codes (O, I), int8 or float8.
        scales: Scales (O, G) float32, with values that the artifact's type represents exactly.
        zero_points: Zero points (O, G) int8; None for a symmetric scheme.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def dequantize(self) -> Tensor:
        """Returns the matrix that the artifact computes with: (O, I) float32."""
        return dequantize(self.codes, self.scales, self.zero_points)


@dataclass(frozen=True)
class Grid:
    """The values that the weights of each group can take.

    Attributes:
        scheme: Scheme that says how many values there are.
        scales: Scales (O, G) float32.
        zero_points: Zero points (O, G), whole numbers in float32; None for a symmetric scheme.
    """

    scheme: Scheme
    scales: Tensor
    zero_points: Tensor | None

    def encode(self, weight: Tensor) -> Tensor:
        """Returns the nearest codes of a matrix (O, I): int8, or float8."""
        scaled = _grouped(weight, self.scales) / self.scales.unsqueeze(-1)  # (O, G, S)
        # Beyond the largest float8 the cast gives NaN.
        if self.scheme.number is Number.float8:
            return scaled.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(FLOAT8).flatten(1)
        if self.zero_points is not None:
            scaled = scaled + self.zero_points.unsqueeze(-1)
        low, high = code_range(self.scheme.bits)
        return scaled.round().clamp(low, high).to(torch.int8).flatten(1)

    def quantize(self, weight: Tensor) -> Quantized:
        """Returns a matrix (O, I) rounded to the nearest values of the grid."""
        return self.of(self.encode(weight))

    def of(self, codes: Tensor) -> Quantized:
        """Returns the quantized matrix for codes (O, I) that were chosen elsewhere."""
        zero_points = None if self.zero_points is None else self.zero_points.to(torch.int8)
        return Quantized(self.scheme, codes, self.scales, zero_points)

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Returns scale and zero point of each weight of some columns: (O, stop - start) each."""
        size = 2**62 if self.scheme.group_size is None else self.scheme.group_size
        groups = torch.arange(start, stop) // size
        zero_points = None if self.zero_points is None else self.zero_points[:, groups]
        return self.scales[:, groups], zero_points


def code_range(bits: int) -> tuple[int, int]:
    """Returns the smallest and the largest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def fit_grid(
    weight: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: float | Tensor = 1.0
) -> Grid:
    """Returns a grid that spans the values of each group of a matrix.

    Args:
        weight: Weight matrix (O, I) float32.
        scheme: Scheme of the grid.
        dtype: Type in which the artifact stores scales. Scales are rounded to it here, before codes
            are chosen, so that codes and scales fit together in the artifact.
        shrink: Share of each group's range that the grid spans, either one value or (O, G); weights
            beyond it are clipped.
    """
    grouped = _group(weight, scheme)  # (O, G, S)
    if scheme.number is Number.float8:
        return Grid(scheme, _rounded(grouped.abs().amax(-1) * shrink / _FLOAT8_MAX, dtype), None)
    low, high = code_range(scheme.bits)
    if scheme.symmetric:
        # Two's complement has one more negative code than positive ones, so that the range is half
        # a step wider than the largest positive code on each side.
        span = 2 * grouped.abs().amax(-1) * shrink
        return Grid(scheme, _rounded(span / (high - low), dtype), None)
    # The range includes zero, so that a weight of zero (a pruned one) has an exact code.
    smallest = grouped.amin(-1).clamp_max(0.0) * shrink
    largest = grouped.amax(-1).clamp_min(0.0) * shrink
    scales = _rounded((largest - smallest) / (high - low), dtype)
    return Grid(scheme, scales, (low - smallest / scales).round().clamp(low, high))


def dequantize(codes: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
    """Returns `(codes - zero_points) * scales`: (O, I) float32."""
    grouped = _grouped(codes.float(), scales)
    if zero_points is not None:
        grouped = grouped - zero_points.float().unsqueeze(-1)
    return (grouped * scales.float().unsqueeze(-1)).flatten(1)


def round_activation(x: Tensor, activation: Activation) -> Tensor:
    """Returns an input (..., I) as layers with quantized activations see it: one scale a token."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST)
    if activation is Activation.int8:
        # Divided by 127 as vLLM and torchao do, so that -128 is not used.
        scale = largest / 127
        return (x / scale).round().clamp(-127, 127) * scale
    if activation is Activation.float8:
        scale = largest / _FLOAT8_MAX
        return (x / scale).to(FLOAT8).to(x.dtype) * scale
    return x


def _group(weight: Tensor, scheme: Scheme) -> Tensor:
    return weight.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)


def _grouped(weight: Tensor, scales: Tensor) -> Tensor:
    return weight.view(*scales.shape, -1)


def _rounded(scales: Tensor, dtype: torch.dtype) -> Tensor:
    # A scale must not become 0 in `dtype`: the smallest subnormal is the least that it can hold.
    kind = torch.finfo(dtype)
    return scales.clamp_min(max(_SMALLEST, kind.tiny * kind.eps)).to(dtype).float()
