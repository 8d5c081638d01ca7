"""Runs the parent, a block at a time, and notes what each part of it does.

Shapes: N samples of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compression.hidden import Hidden, embed
from compression.stream import BlockStream
from compression.structured.importance import Scores
from compression.structured.plan import Plan, kept_of_block
from compression.structured.refit import Gram, refit

_READS = {"self_attn.o_proj": "query", "mlp.down_proj": "mlp"}


@torch.no_grad()
def measure(
    plan: Plan, stream: BlockStream, calibration: Tensor, done: Callable[[int], None]
) -> None:
    """Writes `plan.measured` of each block that has none yet.

    Args:
        plan: What for.
        stream: Of the parent, of which nothing was read yet.
        calibration: Token ids (N, T) int64.
        done: Told how many blocks were measured.
    """
    parent = plan.family.shape
    first = 0
    while plan.measured(first).exists():
        first += 1
    done(first)
    if first == parent.blocks:
        return
    hidden = Hidden(plan.hidden(first), (*calibration.shape, parent.hidden))
    if not hidden.path.exists():
        first = 0
        stream.load_embedding()
        hidden = embed(calibration, stream.embed, plan.hidden(0), parent.hidden)
        stream.model.get_input_embeddings().to("meta")
    for index in range(first, parent.blocks):
        block = stream.load(index)
        scores = Scores(block, parent)
        grams = {name: Gram(layer) for name, layer in _to_refit(plan, block).items()}

        def run(batch: Tensor, index: int = index, scores: Scores = scores) -> Tensor:
            output = stream.run(index, batch)
            scores.see(batch, output)
            return output

        following = hidden.map(run, plan.hidden(index + 1))
        found = scores.finish()
        kept = kept_of_block(plan.shape, found["heads"], found["mlp"])
        for name, gram in grams.items():
            weight = block.get_parameter(f"{name}.weight")
            places, damping = kept[_READS[name]], plan.config.damping
            found[f"{name}.weight"] = refit(weight, gram.finish(), places, damping)
        plan.save(index, found)
        hidden.path.unlink()
        hidden = following
        stream.release(index)
        done(index + 1)
    hidden.path.unlink()


def _to_refit(plan: Plan, block: nn.Module) -> dict[str, Any]:
    """The layers of a block that lose inputs."""
    if not plan.config.refit:
        return {}
    parent, child = plan.family.shape, plan.shape
    return {
        name: block.get_submodule(name)
        for name, axis in _READS.items()
        if child.size(axis) < parent.size(axis)
    }
