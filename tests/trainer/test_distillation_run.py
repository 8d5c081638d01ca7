"""Whole runs of objective=distill: what they record, keep, hand on, go on from and refuse."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.trainer.small_config import LLAMA
from tests.trainer.test_matrix import Case, assert_passed, pairs_of, run
from tests.trainer.test_refusals import assert_refused
from trainer.checkpoint import committed, tensor_shapes

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
}


def write_teacher(folder, family="llama", vocab_size=320, **fields):
    """Without a tokenizer: then it is the user who knows that its tokens are the data's."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=vocab_size, **SIZES, **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def distil(small, tmp_path):
    """Overrides of a run with a teacher in `tmp_path / "teacher"`."""
    teacher = write_teacher(tmp_path / "teacher")
    return [*small, "objective=distill", f"objective.teacher={teacher}"]


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_leaves(trainer, distil, tmp_path):
    run_dir = tmp_path / "run"
    words = ["objective.weight=0.75", "objective.temperature=2"]
    assert trainer(*distil, "export.at_end=true", *words).code == 0
    for record in records(run_dir):
        parts = 0.75 * record["distillation_loss"] + 0.25 * record["cross_entropy"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["objective"] == {
        "teacher": str(tmp_path / "teacher"),
        "revision": None,
        "temperature": 2.0,
        "weight": 0.75,
        "teacher_dtype": "float32",
    }
    [*_, newest] = committed(run_dir / "checkpoints")
    assert not [name for name in tensor_shapes(newest) if "teacher" in name]
    lineage = json.loads((run_dir / "export" / "lineage.json").read_text())
    assert lineage["parent"] is None, "the teacher's weights are not the student's"
    student = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    assert student.config.hidden_size == 32
    assert load_file(run_dir / "export" / "model.safetensors").keys() <= set(
        dict(student.named_parameters())
    )


def test_validation_compares_with_pretraining(trainer, distil, small, tmp_path):
    """At a learning rate of nothing both validate the student as it was drawn."""
    still = ["optim.lr=1e-12", "stop.steps=3"]
    losses = []
    for name, overrides in (("a", distil), ("b", small)):
        assert trainer(*overrides, *still, f"run.dir={tmp_path / name}").code == 0
        losses.append([r for r in records(tmp_path / name) if "validation_loss" in r][-1])
    assert losses[0]["validation_loss"] == pytest.approx(losses[1]["validation_loss"], abs=1e-6)
    assert losses[0]["cross_entropy"] == pytest.approx(losses[1]["loss"], abs=1e-6)
    assert losses[0]["loss"] == losses[0]["distillation_loss"] != losses[0]["cross_entropy"]
    assert "cross_entropy" not in losses[1]


def test_a_teacher_that_spotforge_exported(trainer, small, tmp_path):
    """It brings its tokenizer, which must be the data's, and is here."""
    assert trainer(*small, "export.at_end=true").code == 0
    teacher = tmp_path / "teacher"
    (tmp_path / "run" / "export").rename(teacher)
    wanted = ["objective=distill", f"objective.teacher={teacher}", f"run.dir={tmp_path / 'other'}"]
    assert trainer(*small, *wanted, "model.config.hidden_size=16").code == 0
    shutil.rmtree(tmp_path / "other")
    result = trainer(*small, *wanted, "data.tokenizer_vocab_size=260")
    assert_refused(
        result, [f"objective.teacher={teacher}", "tokenizer", f"data.tokenizer={teacher}"]
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.weight=1.5"], ["objective.weight=1.5"]),
        (["objective.weight=-0.1"], ["objective.weight=-0.1"]),
        (["objective.weight=nan"], ["objective.weight=nan"]),
        (["objective.temperature=0"], ["objective.temperature=0", "above 0"]),
        (["objective.temperature=nan"], ["objective.temperature=nan"]),
        (["objective.teacher_dtype=float16"], ["objective.teacher_dtype", "bfloat16"]),
        (["objective.temprature=2"], ["objective.temprature", "in objective"]),
        (["objective.teacher=/no/such/folder"], ["objective.teacher=/no/such/folder"]),
        (["model.vocab_size=384"], ["objective.teacher", "320", "384", "model.vocab_size=320"]),
    ],
    ids=lambda x: x[0],
)
def test_refused(trainer, distil, tmp_path, overrides, words):
    assert_refused(trainer(*distil, *overrides), words)
    assert not (tmp_path / "run").exists(), "something was written"


def test_keys_without_effect_are_refused(trainer, small, tmp_path):
    result = trainer(*small, "objective.temperature=2")
    assert_refused(result, ["objective.temperature", "in objective", "objective=distill"])
    assert not (tmp_path / "run").exists()


def test_teachers_that_cannot_teach(trainer, distil, tmp_path):
    teacher, weights = tmp_path / "teacher", tmp_path / "teacher" / "model.safetensors"

    def refused(*words):
        assert_refused(trainer(*distil), [f"objective.teacher={teacher}", *words])
        assert not (tmp_path / "run").exists(), "something was written"

    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, weights)
    refused(name, "NaN")
    save_file({n: t for n, t in tensors.items() if n != name}, weights)
    refused(name)
    save_file({**tensors, name: tensors[name].T.contiguous()}, weights)
    refused(name, "(48, 96)")
    weights.unlink()
    refused("model.safetensors")


def test_a_teacher_that_caps_its_logits(trainer, distil, tmp_path):
    write_teacher(tmp_path / "teacher", "gemma2", head_dim=12)
    distil = [*distil, "model.attn_implementation=eager"]
    assert_refused(
        trainer(*distil, "model.fused_loss=true"), ["model.fused_loss=True", "Gemma2ForCausalLM"]
    )
    assert not (tmp_path / "run").exists()
    assert trainer(*distil, "stop.steps=3").code == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["fused_loss"] is False


def test_a_resume_with_another_teacher(trainer, distil, small, tmp_path):
    assert trainer(*distil).code == 0
    other = write_teacher(tmp_path / "other")
    changes = {
        "objective.teacher": [*distil, f"objective.teacher={other}"],
        "objective.weight": [*distil, "objective.weight=0.5"],
        "objective.teacher_dtype": [*distil, "objective.teacher_dtype=bfloat16"],
        "objective.revision": [*distil, "objective.revision=v1"],
    }
    for key, overrides in changes.items():
        assert_refused(trainer(*overrides), [f"{key}=", f"allow_changes=[{key}]"])
    assert trainer(*changes["objective.teacher"], "allow_changes=[objective.teacher]").code == 0
    assert_refused(trainer(*small), ["objective.", "allow_changes=[objective."])
    assert trainer(*small, "allow_changes=[objective]").code == 0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_resumed_bit_for_bit_and_by_other_strategies(tmp_path):
    teacher = write_teacher(tmp_path / "teacher")
    settings = [
        *LLAMA,
        "global_batch_size=12",
        "objective=distill",
        f"objective.teacher={teacher}",
        "objective.weight=0.5",
        "objective.temperature=2",
    ]
    pairs = {
        "ddp-1": ["ddp-1", "fsdp-2"],
        "ddp-2": ["ddp-2"],
        "fsdp-2": ["fsdp-2", "zero3-2"],
        "zero1-2": ["zero1-2"],
        "zero3-2": ["zero3-2", "ddp-1"],
    }
    assert_passed(run([Case("distillation", settings, pairs_of(pairs), steps=12)], tmp_path))
