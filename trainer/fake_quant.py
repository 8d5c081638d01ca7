"""Training that feels the rounding to come: weights are rounded in forward, and learn to bear it.

Quantization-aware training with a straight-through gradient (Jacob et al., arXiv 1712.05877).
Parameters, their names and checkpoints stay as they are: rounding is part of forward alone.

Shapes: O outputs, I inputs of a layer.
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
    """Has every linear layer of the decoder blocks round its weight in forward.

    Raises:
        ConfigError: A layer's inputs cannot be parted into groups, there is no such layer, or there
            are experts, which are no linear layers.
    """
    if config.bits is None:
        return
    num_layers = 0
    for block in decoder_blocks(model):
        for name, layer in block.named_modules():
            if _holds_experts(layer):
                rule = f"the experts of {name} are one tensor, which it does not round"
                raise ConfigError("fake_quant.bits", config.bits, rule, "set it to null")
            if not isinstance(layer, nn.Linear):
                continue
            if config.group_size is not None and layer.in_features % config.group_size:
                rule = f"does not divide the {layer.in_features} inputs of {name}"
                raise ConfigError("fake_quant.group_size", config.group_size, rule, "use 32 or 64")
            layer.forward = partial(_forward, layer, config)  # type: ignore[method-assign]
            num_layers += 1
    if not num_layers:
        rule = f"{type(model).__name__} has no linear layers in its decoder blocks"
        raise ConfigError("fake_quant.bits", config.bits, rule, "set it to null")


def _holds_experts(layer: nn.Module) -> bool:
    """Whether matrices of several experts are one parameter of it."""
    is_convolution = isinstance(layer, nn.modules.conv._ConvNd)
    return not is_convolution and any(p.ndim == 3 for p in layer.parameters(recurse=False))


def fake_quantize(
    weight: Tensor, bits: int, group_size: int | None, scale_dtype: torch.dtype
) -> Tensor:
    """A weight (O, I), rounded symmetrically to the nearest; its gradient is that of the weight.

    Args:
        weight: Of any floating type; it is rounded in float32.
        bits: Of a code.
        group_size: Consecutive inputs that share a scale; None: all of a row.
        scale_dtype: In which the artifact will hold scales.
    """
    grouped = weight.float().view(len(weight), -1, group_size or weight.shape[1])  # (O, G, S)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = 2 * grouped.detach().abs().amax(-1, keepdim=True) / (high - low)
    scales = scales.clamp_min(_SMALLEST).to(scale_dtype).float()
    rounded = (grouped.detach() / scales).round().clamp(low, high) * scales
    error: Tensor = (rounded.view_as(weight).to(weight.dtype) - weight).detach()
    return weight + error


def _forward(layer: nn.Linear, config: FakeQuantConfig, x: Tensor) -> Tensor:
    assert config.bits is not None
    dtype = torch_dtype(config.scale_dtype.value)
    weight = fake_quantize(layer.weight, config.bits, config.group_size, dtype)
    return F.linear(x, weight, layer.bias)
