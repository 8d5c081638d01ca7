"""Restores buffers that are not in the weight files to what the model's constructor computes.

`from_pretrained` builds a model on the meta device and then allocates such buffers without a value,
unless the model's class computes them again (huggingface/transformers#48892). Rotary frequencies,
scales and masks are such buffers. A plain forward uses the same wrong values, so a comparison with
it would not detect them.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.constructed import constructed_values

_ROUNDING = 0.02  # relative; the constructor may have computed in fewer bits than this call


def restore_buffers(model: Any) -> list[str]:
    """Sets a loaded model's non-persistent buffers to what its constructor computes.

    Args:
        model: A model of transformers, before its first forward.

    Returns:
        Names of the buffers that had other values.
    """
    buffers = dict(model.named_non_persistent_buffers())
    wanted = constructed_values(model, seed=0) if buffers else {}
    restored = []
    for name, buffer in buffers.items():
        value = wanted.get(name)
        if value is None or value.shape != buffer.shape:
            continue  # quantization replaced the buffer's module by one of its own
        value = value.to(buffer.device, buffer.dtype)
        if not torch.allclose(value, buffer, rtol=_ROUNDING, atol=0.0, equal_nan=True):
            buffer.copy_(value)
            restored.append(name)
    return restored
