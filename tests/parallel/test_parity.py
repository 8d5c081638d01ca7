"""Same seed, same global batch: every strategy at every world size gives the same losses.

The losses are compared with a golden file, so that a change of the numbers is seen.
`python -m tests.parallel.test_parity` updates it (in a commit of its own).
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from parallel.config import DdpConfig, Dtype, FsdpConfig, PrecisionConfig, ZeroConfig
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.small_run import SmallRun

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"
# A step of four ranks costs four steps; faults that take many steps to show do with two as well.
STEPS = {1: 20, 2: 20, 4: 8}

STRATEGIES = {
    "ddp": DdpConfig(),
    "fsdp": FsdpConfig(),
    "fsdp_keep": FsdpConfig(reshard_after_forward=False),
    "hsdp": FsdpConfig(dp_replicate=2),
    "zero1": ZeroConfig(stage=1),
    "zero2": ZeroConfig(stage=2),
    "zero3": ZeroConfig(stage=3),
    "zero3_offload": ZeroConfig(stage=3, offload_optimizer=True, offload_parameters=True),
}


def train_each(names):
    """Losses and gradient norms of each strategy, trained one after another by the same ranks."""
    with join_world() as world:
        steps = STEPS[world.world_size]
        return {name: SmallRun(STRATEGIES[name], world).train(steps) for name in names}


@cache
def losses_of(family, world_size):
    names = [
        name
        for name, parallel in STRATEGIES.items()
        if name.startswith("zero") == (family == "zero")
        and getattr(parallel, "dp_replicate", 1) <= world_size
    ]
    ranks = run_distributed(train_each, world_size, names)
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_losses_agree(name, world_size):
    if name == "hsdp" and world_size == 1:
        pytest.skip("two replicas need two ranks")
    zero = name.startswith("zero")
    golden = json.loads(GOLDEN.read_text())[: STEPS[world_size]]
    trained = losses_of("zero" if zero else "torch", world_size)[name]
    for (loss, norm), (expected, expected_norm) in zip(trained, golden, strict=True):
        assert loss == pytest.approx(expected, abs=1e-5 if zero else 1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert trained[-1][0] < trained[0][0] - 0.5  # it did learn


def train_sending_bfloat16(name):
    with join_world() as world:
        precision = PrecisionConfig(reduce_dtype=Dtype.bfloat16)
        run = SmallRun(STRATEGIES[name], world, precision=precision)
        losses = run.train(STEPS[world.world_size])
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        return losses


@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_gradients_may_be_sent_in_bfloat16(name):
    """Rounded to 8 bits of mantissa: a little else than float32, and the same on all ranks."""
    first, second = run_distributed(train_sending_bfloat16, 2, name)
    assert first == second
    golden = json.loads(GOLDEN.read_text())[: STEPS[2]]
    assert first != golden
    for (loss, _), (expected, _) in zip(first, golden, strict=True):
        assert loss == pytest.approx(expected, rel=1e-2)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(losses_of("torch", 1)["ddp"], indent=1) + "\n")
