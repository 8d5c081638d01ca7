"""Structured pruning: what comes out is an ordinary model, and what had no effect leaves none."""

import dataclasses
import gc
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compression.command import COMPRESSION
from compression.recipe import StructuredPruneConfig
from compression.result import Result
from compression.stream import BlockStream
from compression.structured import plan as plan_module
from compression.structured.family import recognize
from compression.structured.prune import check, prune_structured
from compression.structured.refit import LeastSquares
from compression.structured.sizes import target_shape
from core.errors import ConfigError, Interrupted

SHARED = Path(__file__).parents[4] / "shared" / "data"
STORIES, SHAKESPEARE = SHARED / "models" / "stories260K", SHARED / "text" / "tinyshakespeare.txt"
needs_stories = pytest.mark.skipif(
    not (STORIES.is_dir() and SHAKESPEARE.is_file()), reason=f"{SHARED} has no stories260K"
)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1], "pad_token_id": 0},
}
IDS = torch.randint(0, 96, (8, 24), generator=torch.Generator().manual_seed(1))


def make(folder, kind="llama", change=lambda model: None, dtype=torch.float32, **sizes):
    """Saves a random model; embeddings of unit size, biases that are not zero."""
    fields = SIZES | {"model_type": kind} | KINDS.get(kind, {}) | sizes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=1.0 if "embed" in name else 0.15)
        change(model)
    model.to(dtype).save_pretrained(folder)
    return folder


def prune(source, out, advance=lambda done, total: None, stop=lambda: False, ids=IDS, **config):
    work = out.with_name(f"{out.name}-work")
    work.mkdir(exist_ok=True)
    settings = StructuredPruneConfig(**config)
    return prune_structured(source, out, settings, ids, work, advance, stop)


@torch.no_grad()
def logits(folder, ids=IDS):
    return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_the_child_is_an_ordinary_model_of_the_sizes_asked_for(kind, tmp_path):
    parent = make(tmp_path / "parent", kind)
    widths = {"heads": 1 / 3, "mlp": 0.33, "hidden": 1 / 3, "depth": 0.25}
    report = prune(parent, tmp_path / "child", **widths)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "child", output_loading_info=True)
    assert not any(info.values()), info
    asked = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 3,
    }
    config = json.loads((tmp_path / "child" / "config.json").read_text())
    assert {key: config[key] for key in asked} == asked == report["child"]
    assert sum(p.numel() for p in model.parameters()) == report["num_params"]
    of_parent = AutoModelForCausalLM.from_pretrained(parent)
    assert sum(p.numel() for p in of_parent.parameters()) == report["parent_num_params"]
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == bool(of_parent.config.tie_word_embeddings)
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_removed_is_a_copy(kind, dtype, tmp_path):
    parent = make(tmp_path / "parent", kind, dtype=dtype)
    report = prune(parent, tmp_path / "child")
    assert report["removed_share"] == 0
    assert torch.equal(logits(tmp_path / "child"), logits(parent))
    config = json.loads((tmp_path / "child" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def silence_heads(model):
    """The middle key-value head of each block says nothing."""
    for block in model.model.layers:
        for parameter in block.self_attn.v_proj.parameters():
            parameter[8:16] = 0


def silence_mlp(model):
    for block in model.model.layers:
        for parameter in block.mlp.up_proj.parameters():
            parameter[[1, 5, 6, 7, 20, 33, 46, 47]] = 0


def silence_hidden(model):
    places = [*range(0, 40, 2), 41, 43, 45, 47]
    model.model.embed_tokens.weight[:, places] = 0
    for block in model.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            for parameter in layer.parameters():
                parameter[places] = 0


def silence_block(model):
    for layer in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        for parameter in layer.parameters():
            parameter.zero_()


SILENCE = {
    "heads": (silence_heads, 1 / 3),
    "mlp": (silence_mlp, 8 / 64),
    "hidden": (silence_hidden, 1 / 2),
    "depth": (silence_block, 1 / 4),
}


@pytest.mark.parametrize("kind", ["llama-biased", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "width,refits",
    # a norm divides by the mean of fewer channels, and only the refit makes up for that
    [
        (width, refits)
        for width in SILENCE
        for refits in (True, False)
        if refits or width != "hidden"
    ],
)
def test_what_has_no_effect_goes_first_and_leaves_no_trace(kind, width, refits, tmp_path):
    change, share = SILENCE[width]
    parent = make(tmp_path / "parent", kind, change)
    report = prune(parent, tmp_path / "child", refit=refits, **{width: share})
    wanted, found = logits(parent), logits(tmp_path / "child")
    assert report["removed_share"] > 0
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_settings_of_a_layer_go_with_it(tmp_path):
    for kind, key in (("qwen2", "layer_types"), ("smollm3", "no_rope_layers")):
        parent = make(tmp_path / kind, kind, silence_block)
        prune(parent, tmp_path / f"{kind}-child", depth=3.0)
        before = AutoConfig.from_pretrained(parent)
        after = json.loads((tmp_path / f"{kind}-child" / "config.json").read_text())
        wanted = getattr(before, key)
        assert after[key] == [wanted[0], *wanted[2:]]
    assert AutoConfig.from_pretrained(tmp_path / "qwen2-child").max_window_layers == 1


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3"])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_dial_removes_the_share_that_was_asked_for(kind, share, tmp_path):
    source = make(tmp_path / "parent", kind, vocab_size=320, hidden_size=192)
    report = prune(source, tmp_path / "child", params=share, multiple_of=1)
    assert report["removed_share"] == pytest.approx(share, abs=0.02)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    left = sum(p.numel() for p in model.parameters()) / report["parent_num_params"]
    assert left == pytest.approx(1 - share, abs=0.02)


def test_sizes_are_rounded_and_something_is_left(tmp_path):
    source = make(tmp_path / "parent")
    family = recognize(BlockStream(source))

    def sizes(**config):
        return target_shape(StructuredPruneConfig(**config), family, "recipe.p")

    assert sizes(mlp=0.3).mlp == 48 and sizes(mlp=0.3, multiple_of=5).mlp == 45
    assert sizes(mlp=13.0).mlp == 13 and sizes(heads=1.0).heads == 1
    assert sizes(hidden=0.4).hidden == 24 and sizes(hidden=0.4, heads=2.0).hidden == 32
    assert sizes(heads=0.99, depth=0.99, hidden=0.99) == dataclasses.replace(
        family.shape, heads=1, blocks=1, hidden=8
    )


def test_refit_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    y, start = torch.randn(400, 5, generator=generator), torch.randn(5, 12, generator=generator)
    fit = LeastSquares(5, 12)
    fit.add(x[:300].view(3, 100, 12), y[:300].view(3, 100, 5))
    fit.add(x[300:], y[300:])
    wanted = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(fit.solve(start, 1e-9), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fit.solve(start, 1e9), start)
    torch.testing.assert_close(LeastSquares(5, 12).solve(start, 0.01), start)


def test_killed_anywhere_it_goes_on_and_ends_the_same(tmp_path):
    source = make(tmp_path / "parent", tie_word_embeddings=True)
    config = {"heads": 1.0, "mlp": 0.5, "hidden": 0.5, "depth": 0.25}
    told = []
    prune(source, tmp_path / "whole", lambda done, total: told.append((done, total)), **config)
    assert told[-1] == (7, 7) and [done for done, _ in told] == sorted(d for d, _ in told)
    calls = 0

    class Killed(Exception):
        pass

    def kill(done, total):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:  # the two before it are of what the last call did, and of one block
            raise Killed

    attempts = 0
    while not (tmp_path / "child").exists():
        attempts += 1
        assert attempts < 20
        try:
            prune(source, tmp_path / "child", kill, **config)
        except Killed:
            assert not (tmp_path / "child").exists()
    assert attempts > 3
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "child" / path.name).read_bytes(), path.name
    with pytest.raises(Interrupted):
        prune(source, tmp_path / "stopped", stop=lambda: True, **config)
    assert not (tmp_path / "stopped").exists()


def test_other_work_in_the_folder_is_not_taken_for_its_own(tmp_path):
    source = make(tmp_path / "parent")
    prune(source, tmp_path / "first", mlp=0.5)
    shutil.move(tmp_path / "first-work", tmp_path / "second-work")
    prune(source, tmp_path / "second", mlp=0.5, refit=False)
    prune(source, tmp_path / "third", mlp=0.5, refit=False)
    assert torch.equal(logits(tmp_path / "second"), logits(tmp_path / "third"))
    assert not torch.equal(logits(tmp_path / "first"), logits(tmp_path / "third"))


def test_memory_does_not_grow_with_depth(tmp_path, monkeypatch):
    run, write_rest = BlockStream.run, Result.write_rest
    held, at_end = [], []

    def watched_run(self, index, hidden):
        held.append(sum(p.nbytes for p in self.model.parameters() if p.device.type == "cpu"))
        return run(self, index, hidden)

    def watched_write(self, tensors):
        found = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"
        }
        at_end.append(sum(found.values()))
        write_rest(self, tensors)

    monkeypatch.setattr(BlockStream, "run", watched_run)
    monkeypatch.setattr(Result, "write_rest", watched_write)
    peaks = {}
    for layers in (4, 12):
        source = make(tmp_path / str(layers), num_hidden_layers=layers, intermediate_size=512)
        gc.collect()
        prune(source, tmp_path / f"{layers}-child", mlp=0.5, heads=1.0)
        peaks[layers] = max(held), at_end[-1]
        held.clear()
    assert peaks[12][0] == peaks[4][0]
    assert peaks[12][1] < 1.05 * peaks[4][1], peaks


REFUSED = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96},
    "gemma": SIZES,
    "gemma2": SIZES,
    "olmo2": SIZES,
    "phi3": SIZES | {"pad_token_id": 0},
    "mixtral": SIZES | {"num_local_experts": 2},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_family_is_refused_before_any_work(kind, tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **REFUSED[kind]))
    model.save_pretrained(tmp_path / "parent")
    with pytest.raises(ConfigError) as error:
        prune(tmp_path / "parent", tmp_path / "child", params=0.25)
    assert error.value.key.startswith("model") and "\n" not in str(error.value)
    assert not (tmp_path / "child").exists() and not any((tmp_path / "child-work").iterdir())


def test_scaled_residuals_are_refused_by_the_refit_only(tmp_path):
    source = make(tmp_path / "parent", "granite", residual_multiplier=0.5)
    with pytest.raises(ConfigError, match="refit=false"):
        prune(source, tmp_path / "child", mlp=0.5)
    prune(source, tmp_path / "child", mlp=0.5, refit=False)
    assert torch.isfinite(logits(tmp_path / "child")).all()


@pytest.mark.parametrize(
    "config",
    [
        {"mlp": -0.1},
        {"mlp": 1.5},
        {"mlp": 65.0},
        {"mlp": 0.01},
        {"heads": 0.1},
        {"depth": 5.0},
        {"heads": 2.0, "hidden": 47.0},
        {"params": 0.25, "mlp": 0.5},
        {"params": 0.0},
        {"params": 1.0},
        {"params": 0.99},
        {"multiple_of": 0},
        {"damping": 0.0},
    ],
)
def test_what_cannot_be_is_refused(config, tmp_path):
    source = make(tmp_path / "parent")
    with pytest.raises(ConfigError) as error:
        check(source, StructuredPruneConfig(**config))
    assert error.value.key.removeprefix("recipe.prune_structured.") in config
    assert "\n" not in str(error.value)


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    source = make(tmp_path / "parent")
    (tmp_path / "child").mkdir()
    with pytest.raises(ConfigError, match="out="):
        prune(source, tmp_path / "child", mlp=0.5)
    assert not any((tmp_path / "child").iterdir())


def test_the_recipe_composes():
    step = COMPRESSION.compose(["recipe=prune_structured", "model=x"]).recipe["prune_structured"]
    assert isinstance(step, StructuredPruneConfig) and step.params == 0.25


def shakespeare(num_samples, skip=0):
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    text = SHAKESPEARE.read_text()[skip:][:60_000]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor(ids[: num_samples * 128]).view(num_samples, 128)


@torch.no_grad()
def perplexity(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return math.exp(model(ids, labels=ids).loss)


@needs_stories
def test_important_channels_are_worth_more_than_random_ones(tmp_path, monkeypatch):
    ids, held_out = shakespeare(32), shakespeare(32, skip=500_000)
    found = {}
    for refits in (False, True):
        config = {"mlp": 0.25, "refit": refits, "ids": ids}
        prune(STORIES, tmp_path / f"ours-{refits}", **config)
        ours = perplexity(tmp_path / f"ours-{refits}", held_out)
        random = []
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)

            def choose(scores, count, generator=generator):
                return torch.randperm(len(scores), generator=generator)[:count].sort().values

            with monkeypatch.context() as patch:
                patch.setattr(plan_module, "most_important", choose)
                prune(STORIES, tmp_path / f"random-{refits}-{seed}", **config)
            random.append(perplexity(tmp_path / f"random-{refits}-{seed}", held_out))
        found[refits] = ours, sum(random) / 3
        assert ours < found[refits][1], found
    assert found[False][0] < 0.9 * found[False][1], found
    assert found[True][0] < found[False][0], found


@pytest.fixture(scope="module")
def stories():
    """What the model itself says: (96, 128)."""
    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    torch.manual_seed(0)
    sampled = {"do_sample": True, "top_k": 0, "min_new_tokens": 127, "max_new_tokens": 127}
    return model.generate(torch.ones(96, 1, dtype=torch.int64), pad_token_id=0, **sampled)


@needs_stories
@pytest.mark.parametrize(
    "config",
    [
        {"depth": 4.0},
        {"mlp": 0.5},
        pytest.param({"hidden": 0.25}, marks=pytest.mark.long),
        pytest.param({"heads": 0.5}, marks=pytest.mark.long),
    ],
)
def test_the_refit_makes_up_for_much(config, stories, tmp_path):
    found = [perplexity(STORIES, stories[64:])]
    for refits in (True, False):
        prune(STORIES, tmp_path / f"{refits}", ids=stories[:64], refit=refits, **config)
        found.append(perplexity(tmp_path / f"{refits}", stories[64:]))
    parent, fit, cut = found
    assert parent < fit < parent + 0.85 * (cut - parent), found


@needs_stories
def test_tokenizer_and_generation_settings_come_along(tmp_path):
    prune(STORIES, tmp_path / "child", params=0.25, ids=shakespeare(8))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "child" / name).read_bytes() == (STORIES / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "child")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    start = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert model.generate(start, max_new_tokens=8, do_sample=False).shape[1] > start.shape[1]
