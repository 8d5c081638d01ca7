"""Models are built part by part, exactly as transformers would build them in one piece."""

import math
from functools import partial

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Model
from transformers.models.falcon import modeling_falcon

from core.errors import ConfigError
from core.settings.command import CONFIG_DIR
from parallel.config import DdpConfig, Dtype, FsdpConfig, PrecisionConfig, ZeroConfig
from parallel.optimizer_state import ADAMW
from parallel.strategy import decoder_blocks, sharded_blocks
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.families import zoo
from tests.small_run import MODEL, VOCAB, SmallRun
from trainer.command import TRAINER
from trainer.model import Materializer, build_meta_model
from trainer.model_config import NamedModelConfig, PathModelConfig
from trainer.objective import NextTokenLoss
from trainer.optim import AdamWConfig
from trainer.positions import check_positions

CPU = torch.device("cpu")
LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama tied": NamedModelConfig(
        model_type="llama", vocab_size=512, config={**LLAMA, "tie_word_embeddings": True}
    ),
    "llama untied": NamedModelConfig(
        model_type="llama", vocab_size=512, config={**LLAMA, "tie_word_embeddings": False}
    ),
    "qwen3": NamedModelConfig(
        model_type="qwen3", vocab_size=512, config={**LLAMA, "head_dim": 32, "use_cache": False}
    ),
    "gpt2": NamedModelConfig(
        model_type="gpt2",
        vocab_size=512,
        config={"n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 128},
    ),
}


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Values that `_init_weights` of the outermost model does not give: a learned activation, a tied
# bias, a buffer that a parent of all blocks computes, and a model whose inner one initialises it.
HALF_INITIALISED = {
    "apertus": {"intermediate_size": 64, "num_key_value_heads": 2},
    "data2vec-text": {"intermediate_size": 64, "is_decoder": True},
    "falcon_h1": {
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "ssm_multipliers": [0.5, 2.0, 3.0, 0.25, 1.5],
    },
    "xlstm": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 4},
}


def half_initialised(model_type):
    fields = HALF_INITIALISED[model_type]
    config = AutoConfig.for_model(model_type)
    fields = {**{k: v for k, v in SMALL.items() if hasattr(config, k)}, **fields}
    return NamedModelConfig(
        model_type=model_type, vocab_size=512, attn_implementation=None, config=fields
    )


def materialized(config, seed=0, by_block=False, tokenizer_size=512):
    model = build_meta_model(config, tokenizer_size)
    module = NextTokenLoss(model, fused=True)
    materialize = Materializer(module, model, config, seed, CPU)
    if by_block:
        for block in reversed(decoder_blocks(model)):
            materialize(block)
    materialize(module)
    return model


def everything(model):
    """Parameters and buffers, those too that are not saved."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def usual(config):
    """The same model as transformers constructs it."""
    hf_config = AutoConfig.for_model(
        config.model_type, vocab_size=config.vocab_size, **config.config
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)


def test_attention_that_adds_alibi_twice_is_refused():
    """Eager attention of Falcon is sdpa's with twice the ALiBi: not what such models know."""
    model = zoo.make("falcon_rw").eval()
    token_ids = torch.randint(3, 259, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = model(token_ids, use_cache=False).logits
        model.config._attn_implementation = "eager"
        doubled = model(token_ids, use_cache=False).logits
        alibi_of = modeling_falcon.build_alibi_tensor
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                modeling_falcon, "build_alibi_tensor", lambda *a, **k: alibi_of(*a, **k) / 2
            )
            halved = model(token_ids, use_cache=False).logits
    assert not torch.allclose(doubled, right, atol=1e-2)
    assert torch.allclose(halved, right, atol=1e-5)
    config = NamedModelConfig(
        model_type="falcon", vocab_size=64, config={"alibi": True}, attn_implementation="eager"
    )
    with pytest.raises(ConfigError, match="ALiBi"):
        build_meta_model(config, 1)


@pytest.mark.parametrize("name", MODELS)
def test_weights_do_not_depend_on_the_parts(name):
    whole = everything(materialized(MODELS[name]))
    parts = everything(materialized(MODELS[name], by_block=True))
    assert whole.keys() == parts.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, parts[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_weights_do_not_depend_on_the_state_of_the_generator(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = everything(materialized(MODELS[name]))
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"
    torch.manual_seed(2)
    other = everything(materialized(MODELS[name]))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", MODELS)
def test_another_seed_draws_other_matrices(name):
    one, other = (dict(materialized(MODELS[name], seed).named_parameters()) for seed in (0, 1))
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]) == (tensor.ndim == 1), key


@pytest.mark.parametrize("name", MODELS)
def test_no_two_matrices_are_the_same(name):
    """One seed for all modules would draw every block alike."""
    model = materialized(MODELS[name])
    matrices = [p for _, p in model.named_parameters() if p.ndim == 2]
    starts = {tuple(p.flatten()[:4].tolist()) for p in matrices}
    assert len(starts) == len(matrices) > 6


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_transformers(name):
    model = materialized(MODELS[name])
    expected = everything(usual(MODELS[name]))
    actual = everything(model)
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        wanted = expected[key]
        assert tensor.shape == wanted.shape and tensor.dtype == wanted.dtype, key
        if tensor.ndim < 2 or not tensor.is_floating_point():  # norms, biases, buffers: constants
            assert torch.equal(tensor, wanted), key
            continue
        std = model.config.initializer_range
        if key.endswith("c_proj.weight"):
            std /= math.sqrt(2 * model.config.n_layer)
        assert tensor.std().item() == pytest.approx(std, rel=0.05), key
        assert wanted.std().item() == pytest.approx(std, rel=0.05), key
        assert abs(tensor.mean().item()) < 5 * std / math.sqrt(tensor.numel()), key


@pytest.mark.parametrize("model_type", ["phi3", "modernbert-decoder"])
def test_special_tokens_beyond_a_small_vocabulary_are_taken_back(model_type):
    config = NamedModelConfig(
        model_type=model_type, config=SMALL | {"intermediate_size": 64}, attn_implementation=None
    )
    model = build_meta_model(config, 300)
    assert model.get_input_embeddings().weight.shape[0] == 320
    pad = model.config.pad_token_id
    assert pad is None or pad == 319, "a row that the tokenizer does not reach"


def test_positions_that_a_table_holds():
    fields = SMALL | {"intermediate_size": 64, "max_position_embeddings": 40}
    limits = {"gpt2": 40, "opt": 40, "roberta": 38, "llama": None}
    for model_type, limit in limits.items():
        own = {k: v for k, v in fields.items() if hasattr(AutoConfig.for_model(model_type), k)}
        if model_type == "opt":
            own |= {"word_embed_proj_dim": 32}
        if model_type == "roberta":
            own |= {"is_decoder": True}
        config = NamedModelConfig(model_type=model_type, config=own, attn_implementation=None)
        model = build_meta_model(config, 300)
        assert check_positions(model, limit or 40) is None
        if limit is None:
            assert "positions are computed all the same" in check_positions(model, 41)
        else:
            with pytest.raises(ConfigError, match=f"table of {limit} positions"):
                check_positions(model, limit + 1)


@pytest.mark.parametrize(
    ("model_type", "count", "kind"),
    [("mamba", 2, "MambaBlock"), ("roberta", 2, "RobertaLayer"), ("llama", 2, "LlamaDecoderLayer")],
)
def test_blocks_that_are_sharded_are_the_outermost_and_share_nothing(model_type, count, kind):
    own = AutoConfig.for_model(model_type)
    fields = {k: v for k, v in SMALL.items() if hasattr(own, k)}
    fields |= {"is_decoder": True} if model_type == "roberta" else {}
    config = NamedModelConfig(model_type=model_type, config=fields, attn_implementation=None)
    blocks = sharded_blocks(build_meta_model(config, 300))
    assert [type(block).__name__ for block in blocks] == [kind] * count


@pytest.mark.parametrize(
    "model_type",
    [
        "apertus",
        "falcon_h1",
        pytest.param("data2vec-text", marks=pytest.mark.long),
        pytest.param("xlstm", marks=pytest.mark.long),
    ],
)
def test_what_only_the_constructor_sets_is_as_transformers_sets_it(model_type):
    config = half_initialised(model_type)
    expected = everything(usual(config))
    for by_block in (False, True):
        actual = everything(materialized(config, by_block=by_block))
        assert actual.keys() == expected.keys()
        for key, tensor in actual.items():
            if tensor.ndim < 2 or "mup_vector" in key:
                assert torch.equal(tensor, expected[key]), key
            assert not tensor.is_meta and not tensor.isnan().any(), key


@pytest.mark.parametrize("name", MODELS)
def test_rotary_frequencies_are_those_of_transformers(name):
    expected = {k: b for k, b in usual(MODELS[name]).named_buffers() if "inv_freq" in k}
    actual = dict(materialized(MODELS[name], by_block=True).named_buffers())
    assert bool(expected) == (name != "gpt2")
    for key, tensor in expected.items():
        assert tensor[0] == 1 and torch.equal(actual[key], tensor), key


def test_scaled_rotary_frequencies():
    """Llama 3's own, as in `model=llama_1b`."""
    [rope] = [b for k, b in materialized_rope("llama_1b").items() if k.endswith("rotary_emb")]
    assert rope.shape == (32,)
    default = 500_000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(rope[:8], default[:8]), "high frequencies stay"
    assert torch.allclose(rope[-8:], default[-8:] / 32), "low ones are divided by the factor"


def materialized_rope(option):
    config = named(option)
    config.config["num_hidden_layers"] = 1
    model = build_meta_model(config, 1)
    materialize = Materializer(model, model, config, 0, CPU)
    found = {}
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            materialize(module)
            found[name] = module.inv_freq
    return found


@pytest.mark.parametrize("name", ["llama tied", "qwen3", "gpt2"])
def test_tied_weights_are_one_tensor(name):
    model = materialized(MODELS[name], by_block=True)
    tied = model.config.tie_word_embeddings
    one = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert one == tied
    assert tied == (name != "qwen3")


def named(option):
    return TRAINER.compose([f"model={option}"]).model


def decoder_numel(vocab, width, mlp, layers, heads, kv_heads, head_dim, tied, qk_norm):
    """Parameters of a Llama or Qwen3, counted by hand."""
    attention = width * head_dim * (2 * heads + 2 * kv_heads) + (2 * head_dim if qk_norm else 0)
    block = attention + 3 * width * mlp + 2 * width
    return vocab * width * (1 if tied else 2) + layers * block + width


def gpt2_numel(vocab, positions, width, layers):
    linear = 12 * width * width + (3 + 1 + 4 + 1) * width
    return (vocab + positions) * width + layers * (linear + 4 * width) + 2 * width


# Published sizes, and how they come about.
SIZES = {
    "tiny": (2_410_176, decoder_numel(4096, 192, 512, 4, 6, 3, 32, True, False)),
    "llama_1b": (1_235_814_400, decoder_numel(128256, 2048, 8192, 16, 32, 8, 64, True, False)),
    "llama_7b": (6_738_415_616, decoder_numel(32000, 4096, 11008, 32, 32, 32, 128, False, False)),
    "llama_8b": (8_030_261_248, decoder_numel(128256, 4096, 14336, 32, 32, 8, 128, False, False)),
    "qwen3_0_6b": (596_049_920, decoder_numel(151936, 1024, 3072, 28, 16, 8, 128, True, True)),
    "gpt2": (124_439_808, gpt2_numel(50257, 1024, 768, 12)),
}


def test_every_named_model_has_its_size_here():
    files = {p.stem for p in (CONFIG_DIR / "model").glob("*.yaml")}
    assert files == {*SIZES, "config", "pretrained"}


@pytest.mark.parametrize("option", SIZES)
def test_number_of_parameters(option):
    published, by_hand = SIZES[option]
    model = build_meta_model(named(option), tokenizer_size=4096)
    assert all(p.is_meta and p.dtype is torch.float32 for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == published == by_hand


def test_vocabulary_of_the_tokenizer_is_rounded_up():
    config = NamedModelConfig(model_type="llama", config=LLAMA)
    assert build_meta_model(config, 1000).config.vocab_size == 1024
    assert build_meta_model(config, 1024).config.vocab_size == 1024


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (NamedModelConfig(model_type="lama"), "model.model_type=lama"),
        (NamedModelConfig(model_type="llama", config={"hidden": 1}), "model.config.hidden=1"),
        (NamedModelConfig(model_type="phi3", config={"pad_token_id": 32000}), "phi3.*Padding_idx"),
        (NamedModelConfig(model_type="vit"), "causal language model"),
        (PathModelConfig(path="/no/such/folder"), "model.path=/no/such/folder"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        build_meta_model(config, 8)


@pytest.fixture(params=["tied", "untied", "sharded", "gpt2", "gpt2 base"])
def saved(request, tmp_path):
    """A folder as transformers saves it."""
    torch.manual_seed(5)
    if request.param.startswith("gpt2"):
        config = AutoConfig.for_model("gpt2", vocab_size=512, **MODELS["gpt2"].config)
        base = request.param == "gpt2 base"
        model = GPT2Model(config) if base else AutoModelForCausalLM.from_config(config)
    else:
        tied = request.param != "untied"
        config = AutoConfig.for_model("llama", vocab_size=512, **LLAMA, tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # norms and biases too, to be seen
        torch.nn.init.normal_(parameter, std=0.3)
    size = "200KB" if request.param == "sharded" else "5GB"
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (request.param == "sharded")
    return tmp_path


@pytest.mark.parametrize("by_block", [True, False])
def test_pretrained_weights(saved, by_block):
    config = PathModelConfig(path=str(saved), weights=True)
    model = materialized(config, by_block=by_block).eval()
    expected = AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    tokens = torch.randint(0, 512, (2, 16))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    parameters = dict(expected.named_parameters())
    assert dict(model.named_parameters()).keys() == parameters.keys()


def test_random_weights_of_a_pretrained_shape(saved):
    drawn = materialized(PathModelConfig(path=str(saved), weights=False))
    loaded = dict(materialized(PathModelConfig(path=str(saved), weights=True)).named_parameters())
    for name, parameter in drawn.named_parameters():
        assert parameter.shape == loaded[name].shape
        if parameter.ndim == 2:
            assert parameter.std() < 0.05 < 0.25 < loaded[name].std(), name
        assert not torch.equal(parameter, loaded[name]), name


def test_weights_stored_in_bfloat16_are_loaded_in_float32(tmp_path):
    config = AutoConfig.for_model("llama", vocab_size=512, **LLAMA)
    stored = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    stored.save_pretrained(tmp_path)
    model = materialized(PathModelConfig(path=str(tmp_path)))
    for name, parameter in stored.named_parameters():
        loaded = model.get_parameter(name)
        assert loaded.dtype is torch.float32 and torch.equal(loaded, parameter.float()), name


def test_activation_checkpointing_changes_memory_only():
    with join_world() as world:
        losses, calls = [], []
        for on in (False, True):
            run = SmallRun(DdpConfig(), world, checkpointing=on)
            # Before it: recomputation ends inside, with the last tensor that backward needs.
            run.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
            losses.append(run.train(3))
            calls.append(0)
    assert losses[0] == losses[1]
    plain = calls.index(0)
    assert (plain, sum(calls) - plain) == (6, 12), "two micro-batches a step, computed again"


# What takes two ranks, all of it on one gang.

EIGHT_LAYERS = NamedModelConfig(
    model_type="llama", vocab_size=VOCAB, config={**MODEL.config, "num_hidden_layers": 8}
)
STRATEGIES = {
    "ddp": DdpConfig(),
    "fsdp": FsdpConfig(),
    "zero2": ZeroConfig(stage=2),
    "zero3": ZeroConfig(stage=3),
}
BF16 = PrecisionConfig(param_dtype=Dtype.bfloat16)


def held_numel(model):
    """Elements of parameters that this rank has in memory."""
    total = 0
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            parameter = parameter.to_local()
        if not parameter.is_meta:
            total += parameter.untyped_storage().nbytes() // parameter.element_size()
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3
            total += parameter.ds_tensor.numel()
    return total


def peak_while_building(parallel, world):
    """The most that this rank held after any part was materialized, and at the end."""
    model = build_meta_model(EIGHT_LAYERS, VOCAB)
    module = NextTokenLoss(model, fused=True)
    materialize = Materializer(module, model, EIGHT_LAYERS, 0, world.device)
    held = []

    def record(part):
        materialize(part)
        held.append(held_numel(model))

    names = {name for name, p in model.named_parameters() if p.ndim >= 2}
    strategy = parallel.build(world, PrecisionConfig())
    strategy.setup(module, record, partial(AdamWConfig().build, decayed=names), ADAMW)
    return max(held), held_numel(model)


def on_two_ranks():
    results = {}
    with join_world() as world:
        for name in ("ddp", "fsdp", "zero3"):
            results["held", name] = peak_while_building(STRATEGIES[name], world)
        for name, parallel in STRATEGIES.items():
            for precision in (PrecisionConfig(), BF16):
                run = SmallRun(parallel, world, precision=precision)
                initial = {n: _numbers(t) for n, t in run.strategy.state().items()}
                losses = [loss for loss, _ in run.train(5)]
                state = run.strategy.state()
                results["trained", name, precision is BF16] = {
                    "losses": losses,
                    "initial": initial,
                    "dtypes": {str(t.dtype) for t in state.values()},
                    "rotary": run.model.model.rotary_emb.inv_freq.tolist(),
                }
        recomputed = SmallRun(FsdpConfig(), world, checkpointing=True).train(5)
        results["recomputed"] = [loss for loss, _ in recomputed]
    return results


def _numbers(tensor):
    """A copy that outlives the process: torch would share its memory."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().numpy().copy()


@pytest.fixture(scope="module")
def gang():
    """What each of two ranks returns."""
    return run_distributed(on_two_ranks, 2)


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_no_rank_ever_holds_the_full_model(name, gang):
    model = build_meta_model(EIGHT_LAYERS, VOCAB)
    full = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in decoder_blocks(model)[0].parameters())
    root = full - 8 * block
    for rank in gang:
        peak, at_end = rank["held", name]
        # Half of all, and the part in full that is not sharded yet.
        assert peak <= full / 2 + max(block, root) / 2 + 200
        assert peak >= full / 2 and at_end == pytest.approx(full / 2, abs=200)
        whole, _ = rank["held", "ddp"]
        assert whole >= full, "the measure itself"


@pytest.mark.parametrize("name", STRATEGIES)
def test_bfloat16_trains_like_float32(name, gang):
    for rank in gang:
        exact = rank["trained", name, False]["losses"]
        rounded = rank["trained", name, True]["losses"]
        assert rounded[0] != exact[0], "the first forward was not in bfloat16"
        assert rounded[-1] == pytest.approx(exact[-1], abs=0.05)
        assert rounded[-1] < rounded[0] - 0.3


@pytest.mark.parametrize("name", STRATEGIES)
def test_master_weights_and_moments_stay_float32(name, gang):
    for rank in gang:
        assert rank["trained", name, True]["dtypes"] == {"torch.float32"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_master_weights_are_not_rounded_to_bfloat16(name, gang):
    for rank in gang:
        for key, tensor in rank["trained", name, True]["initial"].items():
            assert (tensor == rank["trained", name, False]["initial"][key]).all(), key


@pytest.mark.parametrize("name", STRATEGIES)
def test_rotary_frequencies_are_not_rounded_to_bfloat16(name, gang):
    expected = materialized(MODEL, tokenizer_size=VOCAB).model.rotary_emb.inv_freq.tolist()
    for rank in gang:
        assert rank["trained", name, True]["rotary"] == expected


def test_activation_checkpointing_under_fsdp(gang):
    for rank in gang:
        plain = rank["trained", "fsdp", False]["losses"]
        assert rank["recomputed"] == pytest.approx(plain, abs=1e-6)
