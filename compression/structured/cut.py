"""Reads the blocks that stay once more and writes what is left of them.

Shapes: H hidden size of the parent, C that of the child.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compression.block import Block
from compression.result import Result
from compression.stream import BlockStream
from compression.structured.plan import Plan, kept_of_block

_POWER = {"input_layernorm": "input_power", "post_attention_layernorm": "attention_power"}


@torch.no_grad()
def cut(
    plan: Plan, result: Result, blocks: list[int], hidden: Tensor, done: Callable[[int], None]
) -> None:
    """Writes the child's tensors, a block in memory at a time.

    Args:
        plan: With everything measured.
        result: Where to; blocks that are there already are kept.
        blocks: Those that stay, in order.
        hidden: Channels that stay (C).
        done: Told how many blocks were written.
    """
    stream = BlockStream(plan.source)
    done(result.num_done())
    for index in range(result.num_done(), len(blocks)):
        place = blocks[index]
        block = stream.load(place)
        scores = plan.score(place, "heads"), plan.score(place, "mlp")
        kept = kept_of_block(plan.shape, *scores) | {"hidden": hidden}
        for name, parameter in block.named_parameters():
            axes, tensor = plan.family.block[name], plan.load(place, name)
            if tensor is None:
                parameter.data = _cut(parameter.data, axes, kept)
            else:  # refit: has lost its inputs already
                parameter.data = _cut(tensor, axes[:1], kept)
        for norm, score in _POWER.items():
            _scale(plan, block.get_submodule(norm), plan.score(place, score), hidden)
        new_name = f"{stream.names[place].rpartition('.')[0]}.{index}"
        run = partial(stream.run, place)
        result.write_block(index, Block(new_name, block, {}, lambda: iter(()), run, result.dtype))
        stream.release(place)
        done(index + 1)
    stream.load_embedding()
    stream.load_head()
    tensors = {}
    for name, axes in plan.family.rest.items():
        parameter = stream.model.get_parameter(name)
        parameter.data = _cut(parameter.data, axes, {"hidden": hidden})
        if axes == ("hidden",):
            module = stream.model.get_submodule(name.rpartition(".")[0])
            power = plan.score(plan.family.shape.blocks - 1, "output_power")
            _scale(plan, module, power, hidden)
        tensors[name] = parameter.data
    result.write_rest(tensors)


def _cut(tensor: Tensor, axes: tuple[str, ...], kept: dict[str, Tensor]) -> Tensor:
    for dim, axis in enumerate(axes):
        if axis in kept and len(kept[axis]) < tensor.shape[dim]:
            tensor = tensor.index_select(dim, kept[axis])
    return tensor


def _scale(plan: Plan, norm: Any, power: Tensor, hidden: Tensor) -> None:
    """Makes up for what a norm divides by: the mean square of fewer channels.

    Args:
        plan: Says whether to.
        norm: That was cut.
        power: Of each channel of the parent (H), see `Scores`.
        hidden: Channels that stay (C).
    """
    if plan.config.refit and len(hidden) < len(power):
        norm.weight.mul_(power[hidden].mean().sqrt())
