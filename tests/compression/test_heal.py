"""Pruned models that are trained towards their parent."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compression.artifact import read_report
from compression.recipe import (
    HealConfig,
    PruneConfig,
    QatConfig,
    RoundConfig,
    StructuredPruneConfig,
)
from compression.stage_runner import _stages
from tests.compression.conftest import SMALL, save_model

HEAL = ["recipe.heal.tokens=24000", "recipe.heal.lr=0.003", "recipe.heal.global_batch_size=16"]


def train_words(text, folder):
    """Of a run that learns its text in seconds."""
    return [
        "data=jsonl",
        f"data.path={text}",
        "data.column=text",
        "data.max_seq_len=32",
        "data.tokenizer_vocab_size=300",
        "global_batch_size=16",
        "micro_batch_size=16",
        "stop.steps=150",
        "schedule.warmup_steps=5",
        "optim.lr=0.005",
        f"run.dir={folder / 'run'}",
    ]


def of(step, **settings):
    return [f"recipe.{step}.{key}={value}" for key, value in settings.items()]


def test_steps_of_blocks_go_together_and_the_last_stage_is_of_blocks():
    prune, heal, smaller, rounding = (
        PruneConfig(),
        HealConfig(),
        StructuredPruneConfig(params=0.25),
        RoundConfig(),
    )

    def names(**recipe):
        return [list(stage) for stage in _stages(recipe)]

    assert names(a=prune, b=rounding) == [["a", "b"]]
    assert names(a=prune, b=heal, c=rounding) == [["a"], ["b"], ["c"]]
    assert names(a=smaller, b=heal) == [["a"], ["b"], []]
    assert names(a=smaller, b=prune, c=rounding) == [["a"], ["b", "c"]]
    assert names(a=prune, b=QatConfig()) == [["a"], ["b"], ["b"]]


@pytest.mark.parametrize("is_better", [True, False])
def test_a_heal_that_makes_it_worse_is_not_taken(
    is_better,
    compress,
    parent,
    tmp_path,
    monkeypatch,
):
    def pretend(model, teacher, *_):
        assert teacher == parent
        if is_better:
            return teacher
        save_model(tmp_path / "worse", seed=5)
        return tmp_path / "worse"

    # Of a random model's perplexity nothing follows: what is judged is told.
    told = {True: [9.0, 8.0], False: [8.0, 9.0]}[is_better]
    monkeypatch.setattr("compression.stage_runner.heal", pretend)
    monkeypatch.setattr("compression.stage_runner.perplexity", lambda *_: told.pop(0))
    words = ["recipe=[prune_magnitude,heal]", "evaluation.speed=false", "dtype=float32", "out=x"]
    code, out, err = compress(f"model={parent}", *words)
    assert code == 0, err
    artifact = tmp_path / "x" / "huggingface"
    assert read_report(artifact)["stages"]["heal"]["accepted"] is is_better
    assert ("not taken" in out) is not is_better
    weight = AutoModelForCausalLM.from_pretrained(artifact).model.layers[0].mlp.up_proj.weight
    assert (float((weight == 0).float().mean()) < 0.1) is is_better


def test_nothing_to_heal_towards_is_refused(compress, parent):
    code, _, err = compress(f"model={parent}", "recipe=heal", "out=x")
    assert code == 2 and "recipe=heal: " in err
    words = ("recipe=[prune_wanda,heal]", "recipe.heal.tokens=0", "out=x")
    code, _, err = compress(f"model={parent}", *words)
    assert code == 2 and "recipe.heal.tokens=0: must be above 0" in err


@pytest.mark.parametrize(
    ("recipe", "step"), [("[prune_wanda,heal]", "heal"), ("qat_int4", "qat_int4")]
)
def test_less_than_a_step_is_refused_before_the_work(recipe, step, compress, parent, tmp_path):
    words = [f"recipe={recipe}", f"recipe.{step}.tokens=511", "out=x"]
    code, _, err = compress(f"model={parent}", *words)
    assert code == 2 and f"recipe.{step}.tokens=511: one step takes 512: 16 samples of 32" in err
    assert not (tmp_path / "x").exists()


def loss_on(folder, text):
    """Nats a token of a folder's model, by transformers, on a text in samples of 32 tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    ids = [i for row in rows for i in (*tokenizer(row).input_ids, tokenizer.eos_token_id)]
    samples = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        return model(input_ids=samples, labels=samples).loss.item()


@pytest.mark.long
def test_trained_to_be_rounded(compress, trainer, text, tmp_path):
    """Rounding to 2 bits costs less after a training that felt it.

    The cost is that on the text that was learnt: of made-up words nothing else can be known, and
    what a model has learnt of them by heart costs it on others, where rounding may help it.
    """
    assert trainer(*train_words(text, tmp_path)).code == 0
    small = [word for word in SMALL if not word.startswith("data.")]
    words = [f"run={tmp_path / 'run'}", *small, "evaluation.speed=false"]
    losses = {"parent": loss_on(tmp_path / "run/export", text)}
    for name, recipe in {
        "rounded": ["recipe=int4_weight_only", *of("int4_weight_only", bits=2, group_size="null")],
        "trained": [
            "recipe=qat_int4",
            *of("qat_int4", bits=2, group_size="null", tokens=24000, lr=0.003),
        ],
    }.items():
        code, _, err = compress(*words, *recipe, f"out={name}", data=False)
        assert code == 0, err
        losses[name] = loss_on(tmp_path / name / "compressed_tensors", text)
    assert losses["rounded"] > losses["parent"]
    assert losses["trained"] - losses["parent"] < 0.5 * (losses["rounded"] - losses["parent"])


@pytest.mark.long
@pytest.mark.parametrize(
    "prune", [of("prune_wanda", sparsity=0.9), of("prune_structured", params="null", hidden=0.75)]
)
def test_pruned_healed_quantized_in_one_command(prune, compress, trainer, text, tmp_path):
    """On a model that has learnt its text: healing gives back at least half of what was lost."""
    assert trainer(*train_words(text, tmp_path)).code == 0
    small = [word for word in SMALL if not word.startswith("data.")]
    code, out, err = compress(
        f"run={tmp_path / 'run'}",
        f"recipe=[{prune[0].split('.')[1]},heal,int8_weight_only]",
        *prune,
        *HEAL,
        *small,
        "evaluation.speed=false",
        "out=x",
        data=False,
    )
    assert code == 0, err
    artifact = tmp_path / "x" / "compressed_tensors"
    report = read_report(artifact)
    healed, quality = report["stages"]["heal"], report["evaluation"]
    lost = healed["perplexity_before"] - quality["parent_perplexity"]
    assert healed["accepted"] and lost > 0
    assert quality["child_perplexity"] - quality["parent_perplexity"] < 0.5 * lost
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype="auto")
    model(torch.tensor([[1]]))  # only now are its weights unpacked
    weight = model.model.layers[0].mlp.up_proj.weight
    if "wanda" in prune[0]:
        assert float((weight == 0).float().mean()) >= 0.89  # the zeros were kept
