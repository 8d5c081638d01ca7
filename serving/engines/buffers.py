"""Buffers that no file holds, as the model's own constructor computes them.

`from_pretrained` builds a model without memory and then gives such buffers room, whatever lies in
it, wherever the model's class does not fill them again (huggingface/transformers#48892). Rotary
frequencies, scales and masks are such buffers, and a plain forward of the model is as wrong as any
other, so that no comparison with it would tell.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM


def restore_buffers(model: Any) -> list[str]:
    """Gives a loaded model the buffers that its constructor computes; changes nothing else.

    Args:
        model: Of transformers, before anything ran through it.

    Returns:
        Names of those that held something else.
    """
    with init_empty_weights(include_buffers=False):  # takes no memory for the weights
        fresh = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    wanted = dict(fresh.named_non_persistent_buffers())
    restored = []
    for name, buffer in model.named_non_persistent_buffers():
        value = wanted.get(name)
        if value is None or value.is_meta or value.shape != buffer.shape:
            continue  # of a module that quantization put in the place of another
        value = value.to(buffer.device, buffer.dtype)
        if not torch.equal(value, buffer):
            buffer.copy_(value)
            restored.append(name)
    return restored
