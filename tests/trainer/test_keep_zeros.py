"""A pruned model that is trained on keeps its zeros, exactly, and only these."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from parallel.config import DdpConfig, Dtype, FsdpConfig, PrecisionConfig, ZeroConfig
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.small_run import MODEL, VOCAB, SmallRun
from tests.trainer.test_refusals import assert_refused
from trainer.model_config import PathModelConfig

STRATEGIES = {
    "ddp": DdpConfig(),
    "fsdp": FsdpConfig(),
    "hsdp": FsdpConfig(dp_replicate=2),
    "zero2": ZeroConfig(stage=2),
    "zero3": ZeroConfig(stage=3),
}
BF16 = PrecisionConfig(param_dtype=Dtype.bfloat16)
STEPS = 8


def write_model(folder, vocab_size, pruned=True, **sizes):
    """Half of every matrix is zero, of the embedding too; norms are dense."""
    torch.manual_seed(4)
    config = AutoConfig.for_model("llama", vocab_size=vocab_size, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if pruned and parameter.ndim == 2:
                parameter *= torch.rand_like(parameter) < 0.5
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("pruned"), VOCAB, **MODEL.config)


def train(world, folder, parallel, keep_zeros=True, precision=None):
    """Losses, and (before, after) of this rank's whole tensors by name."""
    model = PathModelConfig(path=str(folder), keep_zeros=keep_zeros)
    run = SmallRun(parallel, world, model=model, precision=precision)
    before = whole(run.strategy.state())
    losses = run.train(STEPS)
    after = whole(run.strategy.state())
    return losses, {name: (before[name], after[name]) for name in before}


def whole(state):
    """Copies that outlive the process."""
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}
    return {n: t.detach().numpy().copy() for n, t in full.items()}


def train_each(folder):
    with join_world() as world:
        found = {name: train(world, folder, p) for name, p in STRATEGIES.items()}
        found["zero3 in bf16"] = train(world, folder, STRATEGIES["zero3"], precision=BF16)
        found["dense"] = train(world, folder, DdpConfig(), keep_zeros=False)
    return found


@pytest.fixture(scope="module")
def alone(pruned):
    """Losses and norms of one rank under DDP."""
    with join_world() as world:
        return train(world, pruned, DdpConfig())[0]


@pytest.fixture(scope="module")
def gang(pruned):
    return run_distributed(train_each, 2, pruned)


def tensors(gang, name):
    return {n: pair for rank in gang for n, pair in rank[name][1].items()}


def is_sparse(name):
    return "proj" in name


@pytest.mark.parametrize("name", [*STRATEGIES, "zero3 in bf16"])
def test_zeros_stay_and_the_rest_moves(gang, name):
    found = tensors(gang, name)
    assert sum(is_sparse(n) for n in found) == 3 * 2 * 7, "weight and two moments of each matrix"
    for key, (before, after) in found.items():
        if not is_sparse(key):
            continue
        if key.startswith("optim."):
            before = found[key.split(".", 1)[1].rsplit(".", 1)[0]][0]
            assert (after[before == 0] == 0).all(), key
            continue
        assert 0.45 < (before == 0).mean() < 0.55
        assert (after[before == 0] == 0).all(), key
        assert (after != before)[before != 0].mean() > 0.999, key
    before, after = found["model.embed_tokens.weight"]
    assert (after != 0).mean() > 0.6, "embeddings are free"


def test_without_it_they_do_not(gang):
    found = tensors(gang, "dense")
    before, after = found["model.layers.0.mlp.up_proj.weight"]
    assert (after[before == 0] != 0).mean() > 0.99


@pytest.mark.parametrize("name", STRATEGIES)
def test_losses_and_norms_do_not_depend_on_the_strategy(alone, gang, name):
    losses = gang[0][name][0]
    assert losses[-1][0] < losses[0][0] - 0.5, "it did learn"
    for (loss, norm), (wanted, wanted_norm) in zip(losses, alone, strict=True):
        assert loss == pytest.approx(wanted, abs=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-4), "the norm is that of what is trained"


# -- Whole runs -------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def wanted(small, tmp_path):
    """Overrides of a run on a pruned model in `tmp_path / "model"`."""
    folder = write_model(tmp_path / "model", 320, **SIZES)
    kept = [s for s in small if not s.startswith("model.")]
    pretrained = ["model=pretrained", f"model.path={folder}", "data.tokenizer=train"]
    exported = ["export.at_end=true", "schedule=constant"]
    return [*kept, *pretrained, *exported, "model.keep_zeros=true"]


def test_a_resumed_run_and_its_export_keep_them(trainer, wanted, tmp_path):
    at_once, in_two = f"run.dir={tmp_path / 'at-once'}", f"run.dir={tmp_path / 'in-two'}"
    result = trainer(*wanted, at_once)
    assert result.code == 0, result.err
    assert "weights are zero and stay zero" in result.out
    assert trainer(*wanted, in_two, "stop.steps=3").code == 0
    assert trainer(*wanted, in_two, "parallel=fsdp").code == 0
    before = load_file(tmp_path / "model" / "model.safetensors")
    exports = [load_file(tmp_path / n / "export/model.safetensors") for n in ("at-once", "in-two")]
    for name, tensor in before.items():
        for exported in exports:
            if is_sparse(name):
                assert torch.equal(exported[name] == 0, tensor == 0), name
            assert not torch.equal(exported[name], tensor), name
        assert torch.allclose(exports[0][name], exports[1][name], atol=1e-6), name
    assert_refused(
        trainer(*wanted, in_two, "model.keep_zeros=false", "stop.steps=8"),
        ["model.keep_zeros=False", "allow_changes=[model.keep_zeros]"],
    )


def test_where_there_is_nothing_to_keep_it_is_refused(trainer, wanted, tmp_path):
    result = trainer(*wanted, "model=config")
    assert_refused(result, ["model.keep_zeros=True", "random weights"])
    dense = write_model(tmp_path / "dense", 320, pruned=False, **SIZES)
    result = trainer(*wanted, f"model.path={dense}")
    assert_refused(result, ["model.keep_zeros=True", "no weight of the model is zero"])
    assert not (tmp_path / "run").exists()
