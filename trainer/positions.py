"""Checks the number of positions for which a model has a table."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from core.errors import ConfigError

# Fields of a transformers config that limit the length of a sequence.
_FIELDS = ("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len")


def check_positions(model: PreTrainedModel, max_seq_len: int) -> str | None:
    """Refuses sequences that are longer than a table of positions in the model.

    A table is recognized by a shape that changes with the number of positions in the config. Rotary
    positions and ALiBi are usually computed for any length: longer sequences only cause a message.

    Args:
        model: Model on any device; if needed, a second one is built on the meta device.
        max_seq_len: Number of tokens in a sample.

    Returns:
        Message about samples that are longer than the model was made for, or None.

    Raises:
        ConfigError: A table is shorter than a sample.
    """
    config = model.config.get_text_config(decoder=True)
    for field in _FIELDS:
        length = getattr(config, field, None)
        if not isinstance(length, int):
            continue
        # Tables with a padding row start after it (RoBERTa), which leaves fewer positions.
        pad_token_id = getattr(config, "pad_token_id", None) or 0
        if max_seq_len <= length - pad_token_id - 1:
            continue
        limit = _table_length(model, config, field, length)
        if limit is not None and max_seq_len > limit:
            raise ConfigError(
                "data.max_seq_len",
                max_seq_len,
                f"{type(model).__name__} has a table of {limit} positions ({field}={length})",
                f"set data.max_seq_len={limit} or less, or, with random weights, a larger "
                f"model.config.{field}",
            )
        if max_seq_len > length:
            return (
                f"data.max_seq_len={max_seq_len} is more than the {field}={length} that "
                f"{type(model).__name__} says it was made for; positions are computed all the same"
            )
    return None


def _table_length(model: PreTrainedModel, config: Any, field: str, length: int) -> int | None:
    """Returns the number of positions in the shortest table, or None without a table."""
    # The same model with twice as many positions shows which tensors depend on their number.
    longer = copy.deepcopy(model.config)
    setattr(longer.get_text_config(decoder=True), field, 2 * length)
    with torch.device("meta"):
        other = type(model)(longer)
    shapes = {name: tensor.shape for name, tensor in _tensors(other)}
    tables = {name for name, tensor in _tensors(model) if tensor.shape != shapes.get(name)}
    if not tables:
        return None
    first = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and f"{name}.weight" in tables
        and module.padding_idx is not None
    ]
    return length - max(first, default=0)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
