"""Which sizes a smaller model gets."""

from __future__ import annotations

import math
from dataclasses import replace

from compression.recipe import StructuredPruneConfig
from compression.structured.family import Family, Shape
from core.errors import ConfigError

_TRIED = 1000  # shares of a width that the dial looks at
_OFF = 0.02  # of the parameters, by which it may miss


def target_shape(config: StructuredPruneConfig, family: Family, key: str) -> Shape:
    """The sizes that a config asks for.

    Args:
        config: Checked.
        family: Of the parent.
        key: The step's, for errors.

    Raises:
        ConfigError: The parent has no such sizes.
    """
    shape, step = family.shape, config.multiple_of
    if config.params is not None:
        return _by_params(config.params, family, step, key)
    heads = _size(config.heads, shape.heads, 1, f"{key}.heads")
    # transformers wants a Llama's hidden size to be a multiple of its heads, whatever head_dim is
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
            raise ConfigError(key, value, f"the model has {size}", "give what is to stay of them")
        return int(value)
    kept = _less(size, value, step)
    if kept == size:
        rule = f"of {size}, in steps of {step}, that removes none"
        raise ConfigError(key, value, rule, "ask for more, or lower multiple_of")
    return kept


def _by_params(params: float, family: Family, step: int, key: str) -> Shape:
    shape = family.shape
    total = family.num_params(shape)

    def removed(candidate: Shape) -> float:
        return 1 - family.num_params(candidate) / total

    candidates = [_dial(shape, share / _TRIED, step) for share in range(_TRIED)]
    best = min(candidates, key=lambda candidate: abs(removed(candidate) - params))
    if abs(removed(best) - params) > _OFF:
        rule = f"widths in steps of {step} come no nearer than {removed(best):.3f}"
        fix = "ask for that, lower multiple_of, or give heads, mlp, hidden and depth"
        raise ConfigError(f"{key}.params", params, rule, fix)
    return best


def _dial(shape: Shape, share: float, step: int) -> Shape:
    """Less MLP width, and from its half on fewer hidden channels, too; heads and depth stay.

    Width rather than depth, and no heads, is what Minitron found best (arXiv 2408.11796); of the
    widths, MLP before hidden channels costs least before any training.
    """
    hidden_step = math.lcm(step, shape.heads * shape.queries)
    return replace(
        shape,
        mlp=_less(shape.mlp, share, step),
        hidden=_less(shape.hidden, share - 0.5, hidden_step),
    )


def _less(size: int, share: float, step: int) -> int:
    """A size without a share of it, in steps; at least one step is left."""
    return size if share <= 0 else min(size, max(step, round(size * (1 - share) / step) * step))
