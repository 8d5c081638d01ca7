"""Selects a model's reference attention, which faster implementations must agree with."""

from typing import Any


def plain_attention(hf_config: Any) -> str:
    """Returns transformers' name of the attention that defines a model.

    It is eager attention, except for Falcon with ALiBi: transformers 5.23 adds the biases twice in
    eager attention, to the scores and in the mask, but once in sdpa, as the model was trained.

    Args:
        hf_config: Transformers' config of the model.
    """
    is_doubled = hf_config.model_type == "falcon" and hf_config.alibi
    return "sdpa" if is_doubled else "eager"
