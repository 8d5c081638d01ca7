"""What is found out about a model before its first step; transformers' own loss is right."""

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, OPTConfig

from core.errors import ConfigError
from parallel.config import DdpConfig, FsdpConfig, PrecisionConfig
from parallel.optimizer_state import ADAMW
from parallel.world import join_world
from tests.distributed import run_distributed
from trainer.data.batch import IGNORE_INDEX, Sample, batches_apart
from trainer.objective import NextTokenLoss
from trainer.optim import AdamWConfig
from trainer.probe import APART, POSITIONS, Probe
from trainer.settle import refuse_layerdrop, settle

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
BALANCED = {**EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 0.1}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
BAMBA = {
    "attn_layer_indices": [1],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "z_loss_coefficient": 0.1,
}
GRIFFIN = {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(model_type, gain=0.1, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * gain)
    return model


def config_of(fused_loss="auto", mask_documents=True, max_seq_len=24):
    return SimpleNamespace(
        seed=0,
        precision=PrecisionConfig(),
        model=SimpleNamespace(fused_loss=fused_loss),
        data=SimpleNamespace(max_seq_len=max_seq_len, mask_documents=mask_documents),
    )


@contextmanager
def on_one_rank(model):
    """The model's objective, what sets it up, and the world."""
    with join_world() as world:
        module = NextTokenLoss(model, fused=True)
        strategy = DdpConfig().build(world, PrecisionConfig())
        strategy.setup(module, lambda _: None, partial(AdamWConfig().build, decayed=set()), ADAMW)
        yield module, strategy, world


@pytest.mark.parametrize(
    ("model_type", "fields", "fuses"),
    [
        ("llama", {}, True),
        ("gpt2", {}, True),
        ("gemma2", {"head_dim": 8}, False),
        ("recurrent_gemma", GRIFFIN, False),
        ("cohere", {}, False),
        ("granite", {"logits_scaling": 2.0}, False),
        ("bert", {"is_decoder": True}, False),
    ],
)
def test_a_head_that_does_more_is_seen_however_small_its_logits(model_type, fields, fuses):
    model = build(model_type, gain=0.0, **fields)
    with on_one_rank(model) as (module, strategy, world):
        found = Probe(config_of(), module, strategy, world).unfusable()
    assert found == (None if fuses else type(model).__name__)
    assert "forward" not in vars(module) and module.training


@pytest.mark.parametrize(
    ("model_type", "fields", "fuses"),
    [
        ("mixtral", BALANCED, True),
        ("gpt_oss", {**BALANCED, "head_dim": 8}, True),
        ("mixtral", EXPERTS, True),
        ("bamba", BAMBA, False),
        ("recurrent_gemma", {**GRIFFIN, "logits_soft_cap": 1.0}, False),
        ("bert", {"is_decoder": True, **NO_DROPOUT}, False),
    ],
)
def test_a_micro_batch_has_the_loss_of_transformers(model_type, fields, fuses):
    model = build(model_type, **fields)
    tokens = torch.randint(3, 64, (2, 24))
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORE_INDEX)], 1)
    expected = model(input_ids=tokens, labels=tokens)
    expected_grads = torch.autograd.grad(expected.loss, list(model.parameters()))
    with on_one_rank(model) as (module, strategy, world):
        resolved = {"model": {}}
        settle(config_of(mask_documents=False), module, strategy, world, resolved, None, print)
        loss = strategy.forward(input_ids=tokens, targets=targets) / 46
        grads = torch.autograd.grad(loss, list(model.parameters()))
    assert resolved["model"]["fused_loss"] is module.fused is fuses
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
    adds = "output_router_logits" in fields or "z_loss_coefficient" in fields
    assert resolved["probe"]["auxiliary_loss"] is module.auxiliary is adds
    assert ("auxiliary_loss" in module.parts) is adds
    if adds:
        assert sum(module.parts.values()).item() == pytest.approx(46 * loss.item(), rel=1e-5)
        assert module.parts["auxiliary_loss"] > 0


class Tokens:
    """A dataset of three documents in a sample of 24 tokens, and one that it cuts."""

    starts = torch.tensor([0, 7, 11, 20]).numpy()

    def __init__(self):
        self.tokens = torch.randint(3, 64, (25,), generator=torch.Generator().manual_seed(0))

    def read(self, start, count):
        return self.tokens[start : start + count].numpy()

    def document_starts(self, start, count):
        inside = (self.starts >= start) & (self.starts < start + count)
        return self.starts[inside] - start


@pytest.mark.parametrize(
    ("model_type", "fields", "way"),
    [
        ("llama", {}, POSITIONS),
        ("mistral", {"sliding_window": 4}, POSITIONS),
        ("mixtral", EXPERTS, POSITIONS),
        ("gpt2", {}, POSITIONS),
        ("opt", OPT, APART),
        ("bloom", {}, APART),
        ("mamba", {"state_size": 4}, APART),
        ("gpt_oss", {**EXPERTS, "head_dim": 8, "sliding_window": 4}, APART),
        ("bert", {"is_decoder": True, **NO_DROPOUT}, APART),
    ],
)
def test_a_document_has_the_loss_that_it_has_alone(model_type, fields, way):
    model = build(model_type, **fields).eval()
    sample = Sample(Tokens(), 0, 0)
    total = 0.0
    for document in torch.tensor_split(sample.dataset.tokens, [7, 11, 20]):
        alone = model(input_ids=document[None], labels=document[None])
        total += alone.loss.item() * (len(document) - 1)
    with on_one_rank(model) as (module, strategy, world):
        resolved = {"model": {}}
        settle(config_of(), module, strategy, world, resolved, None, print)
        assert resolved["probe"]["documents"] == way
        assert module.apart is (way == APART)
        if module.apart:
            batches = [batch.inputs() for batch in batches_apart([[sample]], 0, 24, 1)]
        else:
            names = ("input_ids", "targets", "position_ids")
            row = [torch.from_numpy(column)[None] for column in sample.row(24, True)]
            batches = [dict(zip(names, row, strict=True))]
        module.eval()
        loss = sum(strategy.forward(**batch).item() for batch in batches)
    assert loss == pytest.approx(total, rel=1e-5)


def settled(model, resolved, saved, **config):
    said = []
    with on_one_rank(model) as (module, strategy, world):
        settle(config_of(**config), module, strategy, world, resolved, saved, said.append)
    return module, said


def test_a_run_that_goes_on_computes_as_it_began():
    opt = build("opt", **OPT)
    capped = build("gemma2", head_dim=8)
    before = {"model": {"fused_loss": True}, "data": {"mask_documents": True}}  # nothing was asked
    for model, word in ((opt, "data.mask_documents"), (capped, "model.fused_loss")):
        resolved = {"model": {}}
        module, said = settled(model, resolved, before)
        assert (module.fused, module.apart, module.auxiliary) == (True, False, False)
        assert resolved == {"model": {"fused_loss": True}}
        assert len(said) == 1 and word in said[0] and "before" in said[0]
    new = {"model": {}}
    settled(capped, new, None)
    assert new["model"]["fused_loss"] is False
    asked = {**before, **new}
    for fused in ("auto", False):
        module, said = settled(
            capped, {"model": {}, "probe": new["probe"]}, asked, fused_loss=fused
        )
        assert not module.fused and not said
    for saved in (None, asked):
        with pytest.raises(ConfigError, match=r"model.fused_loss=True: Gemma2ForCausalLM"):
            settled(capped, {"model": {}}, saved, fused_loss=True)


def test_an_auxiliary_loss_that_was_no_part_stays_out_and_is_said():
    before = {"model": {"fused_loss": True}, "data": {"mask_documents": False}}
    for fields, num_lines in ((BALANCED, 1), (EXPERTS, 0)):
        mixtral = build("mixtral", **fields)
        module, said = settled(mixtral, {"model": {}}, before, mask_documents=False)
        assert not module.auxiliary and len(said) == num_lines
        assert all("as before" in line for line in said)
    asked = before | {"probe": {"auxiliary_loss": True}}
    balanced = build("mixtral", **BALANCED)
    module, said = settled(balanced, {"model": {}}, asked, mask_documents=False)
    assert module.auxiliary and "part of the loss" in said[0]


def test_a_key_that_began_later_is_asked_for():
    """Masking that `allow_changes` switches on is no part of what the run did before."""
    before = {"model": {"fused_loss": True}, "data": {"mask_documents": False}}
    resolved = {"model": {}}
    module, _ = settled(build("opt", **OPT), resolved, before)
    assert module.apart and resolved["probe"] == {"documents": APART}


def sharded(parallel):
    """What is found, and the gradients of one step with an auxiliary loss."""
    with join_world() as world:
        model = build("mixtral", **BALANCED)
        names = [name for name, _ in model.named_parameters()]
        module = NextTokenLoss(model, fused=True)
        strategy = parallel.build(world, PrecisionConfig())
        strategy.setup(
            module, lambda _: None, partial(AdamWConfig(lr=1e-2).build, decayed=set()), ADAMW
        )
        resolved = {"model": {}}
        settle(config_of(), module, strategy, world, resolved, None, print)
        tokens = torch.randint(3, 64, (4, 25), generator=torch.Generator().manual_seed(world.rank))
        for last in (False, True):
            with strategy.accumulate(last):
                loss = strategy.forward(input_ids=tokens[:, :-1], targets=tokens[:, 1:])
                strategy.backward(loss / 384)
        norm = strategy.step(None).item()
        whole = {n: t for n, t in strategy.state().items() if n in names}
        sums = {
            n: getattr(t, "full_tensor", lambda t=t: t)().double().sum().item()
            for n, t in whole.items()
        }
        gathered = [sums] * world.world_size
        dist.all_gather_object(gathered, sums)
        return resolved, norm, {n: s for part in gathered for n, s in part.items()}


@pytest.mark.long
def test_shards_are_asked_and_trained_as_whole_models_are():
    (whole, _), (shards, _) = (
        run_distributed(sharded, 2, parallel) for parallel in (DdpConfig(), FsdpConfig())
    )
    assert whole[0] == shards[0]
    assert whole[0]["probe"] == {"auxiliary_loss": True, "documents": POSITIONS}
    assert whole[1] == pytest.approx(shards[1], rel=1e-5)
    for name, total in whole[2].items():
        assert shards[2][name] == pytest.approx(total, rel=1e-4, abs=1e-4), name


@pytest.mark.long
def test_a_run_stores_what_it_found_and_goes_on_with_it(trainer, small, tmp_path):
    run = [
        *small,
        "data.mask_documents=true",
        "model.model_type=gpt_oss",
        "model.attn_implementation=eager",
        "+model.config.num_local_experts=4",
        "schedule=constant",
        "evaluation.every_steps=2",
    ]
    first = trainer(*run, "stop.steps=3")
    assert first.code == 0, first.err
    assert "GptOssForCausalLM does not tell documents apart" in first.out
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["probe"] == {"auxiliary_loss": False, "documents": APART}
    assert config["model"]["fused_loss"] is True
    second = trainer(*run, "stop.steps=5")
    assert second.code == 0 and "fused_loss" not in second.out and "probe" not in second.out
    again = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert again["probe"] == config["probe"]


@pytest.mark.long
@pytest.mark.parametrize("recomputed", ["false", "true"])
def test_a_run_with_an_auxiliary_loss(trainer, small, recomputed):
    experts = ["model.model_type=mixtral", "+model.config.num_local_experts=4"]
    on = [
        "+model.config.output_router_logits=true",
        "+model.config.router_aux_loss_coef=0.5",
        f"activation_checkpointing={recomputed}",
    ]
    assert trainer(*small, *experts, *on, "stop.steps=2", "schedule.warmup_steps=1").code == 0
    run_dir = next(word for word in small if word.startswith("run.dir=")).removeprefix("run.dir=")
    for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        parts = record["cross_entropy"] + record["auxiliary_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
        assert 0.9 < record["auxiliary_loss"] < 1.5, "0.5 x 2 experts a token, about balanced"


def test_layers_that_are_left_out_at_random_need_one_rank():
    for name, config in (
        ("layerdrop", OPTConfig(layerdrop=0.1)),
        ("decoder_layerdrop", BartConfig(decoder_layerdrop=0.1)),
    ):
        refuse_layerdrop(config, 1)
        with pytest.raises(ConfigError) as refused:
            refuse_layerdrop(config, 2)
        assert refused.value.key == f"model.config.{name}" and refused.value.value == 0.1
    refuse_layerdrop(OPTConfig(), 2)
