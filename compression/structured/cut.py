"""Reads the blocks that stay once more and writes what is left of them.

Shapes: N samples of T tokens, H hidden size of the parent, C that of the child.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compression.block import Block
from compression.result import Result
from compression.stream import BlockStream
from compression.structured.plan import Plan, kept_of_block
from compression.structured.refit import Flow

_POWER = {"input_layernorm": "input_power", "post_attention_layernorm": "attention_power"}


@torch.no_grad()
def cut(
    plan: Plan,
    result: Result,
    calibration: Tensor,
    blocks: list[int],
    channels: Tensor,
    done: Callable[[int], None],
) -> None:
    """Writes the child's tensors, a block in memory at a time.

    Args:
        plan: With everything measured.
        result: Where to; blocks that are there already are kept.
        calibration: Token ids (N, T) int64.
        blocks: Those that stay, in order.
        channels: Hidden ones that stay (C).
        done: Told how many blocks were written.
    """
    stream = BlockStream(plan.source)
    flow = Flow(plan, stream, calibration, channels) if plan.refits else None
    first = result.num_done()
    place = blocks[first - 1] + 1 if first else 0  # the parent's next block
    if flow is not None and first < len(blocks) and not flow.resume(place, first):
        first = place = 0
        flow.start()
    done(first)
    for index in range(first, len(blocks)):
        for passed in range(place, blocks[index]):
            if flow is not None:
                stream.load(passed)
                flow.pass_by(passed)
                stream.release(passed)
        place = blocks[index]
        block = stream.load(place)
        if flow is not None:
            flow.see_parent(place, block)
        _cut_block(plan, block, place, channels)
        if flow is not None:
            flow.refit(place, block)
        for parameter in block.parameters():  # what follows sees the block as it is written
            parameter.data = parameter.data.to(result.dtype).float()
        if flow is not None:
            flow.run_child(place, index)
        name = f"{stream.names[place].rpartition('.')[0]}.{index}"
        run = partial(stream.run, place)
        result.write_block(index, Block(name, block, {}, lambda: iter(()), run, result.dtype))
        if flow is not None:
            flow.tidy()
        stream.release(place)
        place += 1
        done(index + 1)
    _write_rest(plan, stream, result, channels)


def _cut_block(plan: Plan, block: nn.Module, place: int, channels: Tensor) -> None:
    scores = plan.score(place, "heads"), plan.score(place, "mlp")
    kept = kept_of_block(plan.shape, *scores) | {"hidden": channels}
    for name, parameter in block.named_parameters():
        parameter.data = _cut(parameter.data, plan.family.block[name], kept)
    for norm, power in _POWER.items():
        _scale(plan, block.get_submodule(norm), plan.score(place, power), channels)


def _write_rest(plan: Plan, stream: BlockStream, result: Result, channels: Tensor) -> None:
    stream.load_embedding()
    stream.load_head()
    tensors = {}
    for name, axes in plan.family.rest.items():
        parameter = stream.model.get_parameter(name)
        parameter.data = _cut(parameter.data, axes, {"hidden": channels})
        if axes == ("hidden",):
            norm = stream.model.get_submodule(name.rpartition(".")[0])
            power = plan.score(plan.family.shape.blocks - 1, "output_power")
            _scale(plan, norm, power, channels)
        tensors[name] = parameter.data
    result.write_rest(tensors)


def _cut(tensor: Tensor, axes: tuple[str, ...], kept: dict[str, Tensor]) -> Tensor:
    for dim, axis in enumerate(axes):
        if axis in kept and len(kept[axis]) < tensor.shape[dim]:
            tensor = tensor.index_select(dim, kept[axis])
    return tensor


def _scale(plan: Plan, norm: Any, power: Tensor, channels: Tensor) -> None:
    """Makes up for what a norm divides by: the mean square of fewer channels.

    Args:
        plan: Says whether to.
        norm: That was cut.
        power: Of each channel of the parent (H), see `Scores`.
        channels: That stay (C).
    """
    if plan.refits and len(channels) < len(power):
        norm.weight.mul_(power[channels].mean().sqrt())
