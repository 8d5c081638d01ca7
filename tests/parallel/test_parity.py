"""Same seed, same global batch: every strategy at every world size gives the same losses."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from parallel.config import DdpConfig, FsdpConfig, PrecisionConfig, ZeroConfig
from parallel.world import join_world
from tests.distributed import run_distributed
from trainer.config import NamedModelConfig
from trainer.model import Materializer, build_meta_model
from trainer.objective import NextTokenLoss
from trainer.optim import AdamWConfig

STEPS, GLOBAL_BATCH, SEQ_LEN, VOCAB = 20, 8, 32, 128

MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def train_losses(parallel, micro_batch_size):
    """Losses of 20 steps with accumulation and clipping, in float32."""
    with join_world() as world:
        config = NamedModelConfig(model_type="llama", vocab_size=VOCAB, config=MODEL)
        model = build_meta_model(config, VOCAB)
        module = NextTokenLoss(model, fused=True)
        matrices = {n for n, p in model.named_parameters() if p.ndim >= 2}
        strategy = parallel.build(world, PrecisionConfig())
        strategy.setup(
            module,
            Materializer(module, model, config, seed=3, device=world.device),
            partial(AdamWConfig(lr=3e-3, max_norm=0.5).build, decayed=matrices),
        )
        generator = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(STEPS):
            tokens = torch.randint(0, VOCAB // 4, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
            micros = tokens.view(-1, world.world_size, micro_batch_size, SEQ_LEN + 1)[:, world.rank]
            total = torch.zeros(())
            for i, micro in enumerate(micros):
                with strategy.accumulate(last=i == len(micros) - 1):
                    loss = strategy.forward(input_ids=micro[:, :-1], targets=micro[:, 1:])
                    strategy.backward(loss / (GLOBAL_BATCH * SEQ_LEN))
                total += loss.detach()
            norm = strategy.step(0.5)
            dist.all_reduce(total)
            losses.append((total.item() / (GLOBAL_BATCH * SEQ_LEN), norm.item()))
        return losses


@pytest.fixture(scope="module")
def reference():
    return run_distributed(train_losses, 1, DdpConfig(), 2)[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("parallel", "tolerance"),
    [
        pytest.param(DdpConfig(), 1e-6, id="ddp"),
        pytest.param(FsdpConfig(), 1e-6, id="fsdp"),
        pytest.param(FsdpConfig(dp_replicate=2), 1e-6, id="hsdp"),
        pytest.param(ZeroConfig(stage=1), 1e-5, id="zero1"),
        pytest.param(ZeroConfig(stage=2), 1e-5, id="zero2"),
        pytest.param(ZeroConfig(stage=3), 1e-5, id="zero3"),
    ],
)
def test_losses_agree(reference, parallel, tolerance, world_size):
    if getattr(parallel, "dp_replicate", 1) > world_size:
        pytest.skip("two replicas need two ranks")
    losses = run_distributed(train_losses, world_size, parallel, GLOBAL_BATCH // world_size // 2)
    assert losses[0] == losses[-1]
    for (loss, norm), (expected, expected_norm) in zip(losses[0], reference, strict=True):
        assert loss == pytest.approx(expected, abs=tolerance)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert losses[0][-1][0] < losses[0][0][0] - 0.5  # it did learn
