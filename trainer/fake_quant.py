"""Quantization-aware training: weights are rounded in forward, so that they adapt to rounding.

The gradient is passed straight through (Jacob et al., arXiv 1712.05877). Parameters, their names
and checkpoints stay the same: rounding happens in forward only.

Shapes: O outputs and I inputs of a layer.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ConfigError
from parallel.strategy import decoder_blocks, torch_dtype
from trainer.config import FakeQuantConfig

_SMALLEST = 1e-12  # a scale of 0 would divide a group of zeros by 0


def prepare_fake_quant(model: nn.Module, config: FakeQuantConfig) -> None:
    """Makes every linear layer of the decoder blocks round its weight in forward.

    Raises:
        ConfigError: The inputs of a layer cannot be divided into groups, there is no linear layer,
            or there are experts, which are not linear layers.
    """
    if config.bits is None:
        return
    num_layers = 0
    for block in decoder_blocks(model):
        for name, layer in block.named_modules():
            if _holds_experts(layer):
                rule = f"does not support the experts of {name}, which are one tensor"
                raise ConfigError("fake_quant.bits", config.bits, rule, "set it to null")
            if not isinstance(layer, nn.Linear):
                continue
            if config.group_size is not None and layer.in_features % config.group_size:
                rule = f"does not divide the {layer.in_features} inputs of {name}"
                raise ConfigError("fake_quant.group_size", config.group_size, rule, "use 32 or 64")
            # The forward is replaced, not the module: names, parameters and checkpoints stay the
            # same.
            layer.forward = partial(_forward, layer, config)  # type: ignore[method-assign]
            num_layers += 1
    if not num_layers:
        rule = f"{type(model).__name__} has no linear layers in its decoder blocks"
        raise ConfigError("fake_quant.bits", config.bits, rule, "set it to null")


def _holds_experts(layer: nn.Module) -> bool:
    """Returns whether one parameter of a layer holds the matrices of several experts."""
    is_convolution = isinstance(layer, nn.modules.conv._ConvNd)
    return not is_convolution and any(p.ndim == 3 for p in layer.parameters(recurse=False))


def fake_quantize(
    weight: Tensor, bits: int, group_size: int | None, scale_dtype: torch.dtype
) -> Tensor:
    """Returns a weight (O, I) rounded symmetrically to the nearest; gradients pass unchanged.

    Args:
        weight: Weight of any floating type; it is rounded in float32.
        bits: Number of bits of a code.
        group_size: Number of consecutive inputs that share a scale; None: all of a row.
        scale_dtype: Type in which the artifact will store scales.
    """
    grouped = weight.float().view(len(weight), -1, group_size or weight.shape[1])  # (O, G, S)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = 2 * grouped.detach().abs().amax(-1, keepdim=True) / (high - low)
    # Rounded to the type of the artifact, so that training sees the scales that inference uses.
    scales = scales.clamp_min(_SMALLEST).to(scale_dtype).float()
    rounded = (grouped.detach() / scales).round().clamp(low, high) * scales
    # Straight-through: the value is the rounded weight, the gradient is that of the weight.
    error: Tensor = (rounded.view_as(weight).to(weight.dtype) - weight).detach()
    return weight + error


def _forward(layer: nn.Linear, config: FakeQuantConfig, x: Tensor) -> Tensor:
    assert config.bits is not None
    dtype = torch_dtype(config.scale_dtype.value)
    weight = fake_quantize(layer.weight, config.bits, config.group_size, dtype)
    return F.linear(x, weight, layer.bias)
