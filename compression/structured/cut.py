"""Reads the blocks that stay once more, and writes their remaining parts.

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

# Norm of a block -> the score of the residual stream in front of it.
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
    """Writes the child's tensors, with one block in memory at a time.

    Args:
        plan: Plan of the pruning, after the measurement.
        result: Result to write; blocks that it already holds are kept.
        calibration: Token ids (N, T) int64.
        blocks: Numbers of the blocks that stay, in order.
        channels: Hidden channels that stay (C).
        done: Function that is called with the number of blocks that were written.
    """
    stream = BlockStream(plan.source)
    flow = Flow(plan, stream, calibration, channels) if plan.refits else None
    first = result.num_done()
    place = blocks[first - 1] + 1 if first else 0  # number of the parent's next block
    # Without the hidden states of the stopped call, its blocks cannot be continued: all are cut
    # again.
    if flow is not None and first < len(blocks) and not flow.resume(place, first):
        first = place = 0
        flow.start()
    done(first)
    for index in range(first, len(blocks)):
        # A block that is removed still changes the parent's residual stream, which refits aim at.
        for passed in range(place, blocks[index]):
            if flow is not None:
                stream.load(passed)
                flow.pass_by(passed)
                stream.release(passed)
        place = blocks[index]
        block = stream.load(place)
        # The parent's output is kept before the block is cut, since cutting changes it in place.
        if flow is not None:
            flow.see_parent(place, block)
        _cut_block(plan, block, place, channels)
        if flow is not None:
            flow.refit(place, block)
        # Later blocks are fitted to the block as the child will have it, rounded to its type.
        for parameter in block.parameters():
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
    """Corrects a norm for channels that were removed: it divides by the mean square of fewer.

    Args:
        plan: Plan of the pruning, which says whether to correct.
        norm: Norm that was cut.
        power: Mean square of each of the parent's channels (H), see `Scores`.
        channels: Channels that stay (C).
    """
    if plan.refits and len(channels) < len(power):
        norm.weight.mul_(power[channels].mean().sqrt())
