"""Computes the sizes of the smaller model."""

from __future__ import annotations

import math
from dataclasses import replace

from compression.recipe import StructuredPruneConfig
from compression.structured.family import Family, Shape
from core.errors import ConfigError

_TRIED = 1000  # number of shares of a width that `params` tries
_OFF = 0.02  # largest deviation from `params`, as a share of the parameters


def target_shape(config: StructuredPruneConfig, family: Family, key: str) -> Shape:
    """Returns the sizes that a config asks for.

    Args:
        config: Settings that were checked.
        family: Structure of the parent.
        key: Key of the step, for errors.

    Raises:
        ConfigError: The parent does not allow these sizes.
    """
    shape, step = family.shape, config.multiple_of
    if config.params is not None:
        return _by_params(config.params, family, step, key)
    heads = _size(config.heads, shape.heads, 1, f"{key}.heads")
    # transformers requires the hidden size of a Llama to be a multiple of its number of heads,
    # whatever head_dim is.
    hidden_step = math.lcm(step, heads * shape.queries)
    return replace(
        shape,
        heads=heads,
        mlp=_size(config.mlp, shape.mlp, step, f"{key}.mlp"),
        hidden=_size(config.hidden, shape.hidden, hidden_step, f"{key}.hidden"),
        blocks=_size(config.depth, shape.blocks, 1, f"{key}.depth"),
    )


def _size(value: float, size: int, step: int, key: str) -> int:
    if value == 0:
        return size
    if value >= 1:
        if value > size:
            raise ConfigError(key, value, f"the model has {size}", "give the number that stays")
        return int(value)
    kept = _less(size, value, step)
    if kept == size:
        rule = f"removes nothing of {size} in steps of {step}"
        raise ConfigError(key, value, rule, "raise it, or lower multiple_of")
    return kept


def _by_params(params: float, family: Family, step: int, key: str) -> Shape:
    shape = family.shape
    total = family.num_params(shape)

    def removed(candidate: Shape) -> float:
        return 1 - family.num_params(candidate) / total

    candidates = [_dial(shape, share / _TRIED, step) for share in range(_TRIED)]
    best = min(candidates, key=lambda candidate: abs(removed(candidate) - params))
    if abs(removed(best) - params) > _OFF:
        rule = f"the closest share in steps of {step} is {removed(best):.3f}"
        fix = "set that, lower multiple_of, or give heads, mlp, hidden and depth"
        raise ConfigError(f"{key}.params", params, rule, fix)
    return best


def _dial(shape: Shape, share: float, step: int) -> Shape:
    """Returns sizes with less MLP width and, above half of it, fewer hidden channels.

    Minitron (arXiv 2408.11796) found it best to reduce width rather than depth, and to keep heads.
    Of the widths, MLP channels before hidden channels cost least before any training.
    """
    hidden_step = math.lcm(step, shape.heads * shape.queries)
    return replace(
        shape,
        mlp=_less(shape.mlp, share, step),
        hidden=_less(shape.hidden, share - 0.5, hidden_step),
    )


def _less(size: int, share: float, step: int) -> int:
    """Returns a size without a share of it, in steps; at least one step is left."""
    return size if share <= 0 else min(size, max(step, round(size * (1 - share) / step) * step))
