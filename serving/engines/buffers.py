"""Buffers that no file holds, as the model's own constructor computes them.

`from_pretrained` builds a model without memory and then gives such buffers room, whatever lies in
it, wherever the model's class does not fill them again (huggingface/transformers#48892). Rotary
frequencies, scales and masks are such buffers, and a plain forward of the model is as wrong as any
other, so that no comparison with it would tell.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.constructed import constructed_values

_ROUNDING = 0.02  # relative; a constructor may compute in fewer bits than ours


def restore_buffers(model: Any) -> list[str]:
    """Gives a loaded model the buffers that its constructor computes; changes nothing else.

    Args:
        model: Of transformers, before anything ran through it.

    Returns:
        Names of those that held something else.
    """
    buffers = dict(model.named_non_persistent_buffers())
    wanted = constructed_values(model, seed=0) if buffers else {}
    restored = []
    for name, buffer in buffers.items():
        value = wanted.get(name)
        if value is None or value.shape != buffer.shape:
            continue  # of a module that quantization put in the place of another
        value = value.to(buffer.device, buffer.dtype)
        if not torch.allclose(value, buffer, rtol=_ROUNDING, atol=0.0, equal_nan=True):
            buffer.copy_(value)
            restored.append(name)
    return restored
