"""Runs the parent, one block at a time, and measures the importance of its parts.

Shapes: N samples of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compression.hidden import Hidden, embed
from compression.stream import BlockStream
from compression.structured.importance import Scores
from compression.structured.plan import Plan
from core.errors import ConfigError


@torch.no_grad()
def measure(
    plan: Plan, stream: BlockStream, calibration: Tensor, done: Callable[[int], None]
) -> None:
    """Writes `plan.measured` of each block that has none yet.

    Args:
        plan: Plan of the pruning.
        stream: Stream of the parent, with nothing read yet.
        calibration: Token ids (N, T) int64.
        done: Function that is called with the number of blocks that were measured.
    """
    parent = plan.family.shape
    first = 0
    while plan.measured(first).exists():
        first += 1
    done(first)
    if first == parent.blocks:
        return
    hidden = Hidden(plan.hidden(first), (*calibration.shape, parent.hidden))
    # A stopped call left the input of its next block; without it all blocks run again.
    if not hidden.path.exists():
        first = 0
        stream.load_embedding()
        hidden = embed(calibration, stream.embed, plan.hidden(0), parent.hidden)
        stream.model.get_input_embeddings().to("meta")
    for index in range(first, parent.blocks):
        block = stream.load(index)
        if index == first and plan.refits:
            _check_adds(plan, block, partial(stream.run, index), next(hidden.batches()))
        scores = Scores(block, parent)

        def run(batch: Tensor, index: int = index, scores: Scores = scores) -> Tensor:
            output = stream.run(index, batch)
            scores.see(batch, output)
            return output

        following = hidden.map(run, plan.hidden(index + 1))
        # Hidden states of the next block are on disk by now: a resumed call finds both files.
        plan.save(index, scores.finish())
        hidden.path.unlink()
        hidden = following
        stream.release(index)
        done(index + 1)
    hidden.path.unlink()


def _check_adds(
    plan: Plan, block: nn.Module, run: Callable[[Tensor], Tensor], batch: Tensor
) -> None:
    """Raises ConfigError if a block scales what its two halves add to the stream (granite)."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name in ("self_attn.o_proj", "mlp.down_proj"):

        def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            seen[name] = output

        handles.append(block.get_submodule(name).register_forward_hook(hook))
    after = run(batch)
    for handle in handles:
        handle.remove()
    if not torch.allclose(after, batch + sum(seen.values()), rtol=1e-3, atol=1e-4):
        rule = "its blocks scale what they add to the residual stream, which a refit cannot handle"
        fix = "set refit=false of the step"
        raise ConfigError("model", plan.source, rule, fix)
