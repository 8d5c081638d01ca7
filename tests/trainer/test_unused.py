"""Parameters that the loss does not depend on: AdamW alone would pass over them, and so do we."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from parallel.config import DdpConfig, FsdpConfig, PrecisionConfig, ZeroConfig
from parallel.optimizer_state import ADAMW
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.small_run import SEQ_LEN, VOCAB, SmallRun, _batch
from trainer.model import build_meta_model
from trainer.model_config import NamedModelConfig
from trainer.objective import NextTokenLoss
from trainer.optim import AdamWConfig
from trainer.settle import leave_unused

# A decoder made for an encoder, and one whose indexer chooses tokens without a gradient.
BART = NamedModelConfig(
    model_type="bart",
    vocab_size=VOCAB,
    fused_loss=False,
    config={
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
)
DEEPSEEK = NamedModelConfig(
    model_type="deepseek_v32",
    vocab_size=VOCAB,
    attn_implementation="eager",
    config={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
    },
)
CONFIG = SimpleNamespace(data=SimpleNamespace(max_seq_len=SEQ_LEN))
STEPS = 3


def whole(strategy, world):
    """All of the state, on every rank."""
    mine = {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in strategy.state().items()}
    parts = [None] * world.world_size
    dist.all_gather_object(parts, {n: t.detach().clone() for n, t in mine.items()})
    return {n: t for part in parts for n, t in part.items()}


def begin(parallel, world, model):
    run = SmallRun(parallel, world, model)
    said = []
    leave_unused(CONFIG, run.module, run.strategy, world, said.append)
    return run, said


def train(strategies, model):
    """The state before and after, of a run and of one that goes on with it after two steps."""
    found = {}
    with join_world() as world:
        for name, parallel in strategies.items():
            run, said = begin(parallel, world, model)
            before = whole(run.strategy, world)
            run.train(STEPS - 1)
            saved = whole(run.strategy, world)
            run.train(1)
            resumed, _ = begin(parallel, world, model)
            resumed.strategy.load_state(
                lambda tensors, saved=saved: [
                    (t.to_local() if hasattr(t, "to_local") else t).copy_(_share(saved[n], t))
                    for n, t in tensors.items()
                ],
                num_updates=STEPS - 1,
            )
            resumed.step = STEPS - 1
            resumed.train(1)
            states = (before, whole(run.strategy, world), whole(resumed.strategy, world))
            found[name] = said, *({n: t.numpy() for n, t in state.items()} for state in states)
    return found  # arrays: a tensor cannot outlive its process


def _share(full, like):
    """The part of a tensor that this rank holds."""
    if not hasattr(like, "to_local"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements).to_local()


def plain(model, state):
    """The state after as many steps of a plain loop, and the names of what had no gradient."""
    build_meta_model(model, VOCAB)  # nothing refuses it
    stock = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model.model_type, vocab_size=VOCAB, **model.config),
        attn_implementation="eager",
    )
    stock.load_state_dict(state, strict=False)
    parameters = dict(stock.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(STEPS):
        tokens = _batch(step)
        logits = stock(tokens[:, :-1]).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        unused = [name for name, p in parameters.items() if p.grad is None]
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in parameters.items()}, unused


def test_what_takes_no_part_is_named():
    """On one rank, of a BART decoder without an encoder: its cross-attention."""
    torch.manual_seed(0)
    fields = {"vocab_size": VOCAB, **BART.config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", **fields))
    with join_world() as world:
        module = NextTokenLoss(model, fused=False)
        strategy = DdpConfig().build(world, PrecisionConfig())
        strategy.setup(module, lambda _: None, partial(AdamWConfig().build, decayed=set()), ADAMW)
        said = []
        leave_unused(CONFIG, module, strategy, world, said.append)
    cross = [n for n, _ in model.named_parameters() if "encoder_attn" in n]
    assert len(said) == 1 and cross[0] in said[0] and f"{len(cross)} parameters" in said[0]
    assert all(p.grad is None for p in model.parameters()) and model.training


@pytest.mark.long
@pytest.mark.parametrize("model", [BART, DEEPSEEK], ids=lambda model: model.model_type)
@pytest.mark.parametrize("kind", ["torch", "zero"])
def test_two_ranks_train_as_plain_adamw_does(model, kind):
    strategies = (
        {"ddp": DdpConfig(), "fsdp": FsdpConfig()}
        if kind == "torch"
        else {"zero1": ZeroConfig(stage=1), "zero3": ZeroConfig(stage=3)}
    )
    ranks = run_distributed(train, 2, strategies, model)
    for said, *states in ranks[0].values():
        before, after, resumed = (
            {name: torch.from_numpy(array) for name, array in state.items()} for state in states
        )
        wanted, unused = plain(model, before)
        assert unused and len(said) == 1 and f"{len(unused)} parameters" in said[0]
        for name, parameter in wanted.items():
            if name not in after:
                continue  # tied
            torch.testing.assert_close(after[name], parameter, rtol=0, atol=3e-5, msg=name)
            assert torch.equal(after[name], resumed[name]), name
        for name in unused:
            assert torch.equal(after[name], before[name]), name
            assert not after[f"optim.{name}.exp_avg"].any()
