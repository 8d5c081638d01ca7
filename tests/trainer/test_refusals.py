"""What the user got wrong is told in one line, with exit code 2, and nothing is written."""

import os
import shutil
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

REFUSED = {
    "misspelt key": (["micro_batch_sise=4"], ["micro_batch_sise"]),
    "misspelt key of a group": (
        ["parallel=fsdp", "parallel.shard_degre=2"],
        ["parallel.shard_degre", "in parallel"],
    ),
    "added key": (["+paralell.stage=2"], ["paralell={'stage': 2}", "no such key"]),
    "added key of a group": (["+optim.momentum=0.9"], ["optim.momentum"]),
    "unknown option": (["parallel=megatron"], ["megatron", "ddp", "fsdp", "zero"]),
    "wrong type": (["stop.steps=soon"], ["stop.steps", "soon"]),
    "no batch": (["global_batch_size=0"], ["global_batch_size=0", "above 0"]),
    "save interval without a unit": (
        ["checkpoint.interval=1.5"],
        ["checkpoint.interval=1.5", "auto, 500, 90s"],
    ),
    "save interval of nothing": (["checkpoint.interval=0"], ["checkpoint.interval=0"]),
    "keep every none": (["checkpoint.keep_every=0"], ["checkpoint.keep_every=0"]),
    "spikes without looking": (
        ["anomaly.loss_spike=10"],
        ["anomaly.loss_spike=10", "anomaly.action=skip or rollback"],
    ),
    "unknown cloud": (["preemption.cloud=oracle"], ["preemption.cloud=oracle", "aws"]),
    "more shards than ranks": (
        ["parallel=fsdp", "parallel.dp_shard=4"],
        ["parallel.dp_shard=4", "number of ranks, 1", "nproc=4"],
    ),
    "replicas that do not divide": (
        ["parallel=fsdp", "parallel.dp_replicate=2"],
        ["parallel.dp_replicate=2", "must divide"],
    ),
    "offload without support": (
        ["parallel=ddp", "parallel.offload_optimizer=true"],
        ["parallel.offload_optimizer", "in parallel", "parallel=zero"],
    ),
    "parameter offload below stage 3": (
        ["parallel=zero", "parallel.stage=2", "parallel.offload_parameters=true"],
        ["parallel.offload_parameters=True", "parallel.stage=3"],
    ),
    "stage that does not exist": (["parallel=zero", "parallel.stage=4"], ["parallel.stage=4"]),
    "run name outside": (["run.name=../../evil"], ["run.name=../../evil"]),
    "run name empty": (["run.name="], ["run.name="]),
    "no end": (["stop.steps=null"], ["stop=null", "stop.minutes"]),
    "cosine by the clock": (
        ["stop.steps=null", "stop.minutes=1"],
        ["schedule=cosine", "schedule=constant"],
    ),
    "warm-up longer than the run": (["schedule.warmup_steps=6"], ["schedule.warmup_steps=6"]),
    "zero steps": (["stop.steps=0"], ["stop.steps=0", "above 0"]),
    "nproc": (["nproc=many"], ["nproc=many", "auto"]),
    "learning rate": (["optim.lr=-1"], ["optim.lr=-1", "above 0"]),
    "model field misspelt": (
        ["+model.config.hiden_size=4"],
        ["model.config.hiden_size=4", "did you mean hidden_size"],
    ),
    "negative decay": (["optim.weight_decay=-1"], ["optim.weight_decay=-1"]),
    "beta": (["optim.beta1=2"], ["optim.beta1=2"]),
    "not a number": (["optim.lr=nan"], ["optim.lr=nan"]),
    "time that is none": (["stop.minutes=nan"], ["stop.minutes=nan"]),
    "warm-up below zero": (["schedule.warmup_steps=-3"], ["schedule.warmup_steps=-3"]),
    "ratio": (["schedule.min_lr_ratio=-2"], ["schedule.min_lr_ratio=-2"]),
    "decay longer than the run": (
        ["schedule=wsd", "schedule.decay_steps=9"],
        ["schedule.warmup_steps + schedule.decay_steps=11", "6 steps"],
    ),
    "temperature": (["evaluation.sample_temperature=-1"], ["evaluation.sample_temperature=-1"]),
    "bucket": (["parallel.bucket_cap_mb=-1"], ["parallel.bucket_cap_mb=-1"]),
    "seed": (["seed=-5"], ["seed=-5"]),
    "heads that do not divide": (
        ["model.config.num_attention_heads=5"],
        ["model.config", "multiple"],
    ),
    "field of a wrong type": (["model.config.hidden_size=abc"], ["hidden_size", "int"]),
    "attention": (["model.attn_implementation=foo"], ["attn_implementation=foo"]),
    "heads that only fail when they compute": (
        [
            "model.model_type=youtu",
            "+model.config.q_lora_rank=8",
            "+model.config.kv_lora_rank=8",
            "+model.config.qk_rope_head_dim=4",
        ],
        ["model=YoutuForCausalLM", "cannot compute 32 tokens in float32"],
    ),
    "config dir": (["--config-dir=/nope", "--help"], ["/nope"]),
    "model type": (["model.model_type=lama"], ["model.model_type=lama"]),
    "model folder missing": (
        ["model=pretrained", "model.path=/no/such/model"],
        ["model.path", "/no/such/model"],
    ),
    "vocabulary too small": (["model.vocab_size=64"], ["data.tokenizer", "64", "does not fit"]),
    "too little text for a sample": (
        ["data.max_seq_len=100000", "model.config.max_position_embeddings=100000"],
        ["data.max_seq_len"],
    ),
    "missing file": (["data.path=/no/such/file.txt"], ["data.path=/no/such/file.txt"]),
    "missing path": (["data.path=???"], ["data.path"]),
    "experiment unknown": (["experiment=nothing"], ["nothing", "stdlib"]),
    "resume from nowhere": (["resume=/no/such/checkpoint"], ["resume=/no/such/checkpoint"]),
    "run.dir below a file": (["run.dir=/dev/null/run"], ["run.dir", "not a folder"]),
    "compile with DeepSpeed": (["parallel=zero", "compile=true"], ["compile=True"]),
}


def assert_refused(result, words):
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if line and not line.startswith("preparing")]
    assert len(lines) == 1, f"not one line: {result.err}"
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


@pytest.mark.parametrize("case", REFUSED)
def test_refused(trainer, small, tmp_path, case):
    overrides, words = REFUSED[case]
    small = [s for s in small if "model=pretrained" not in overrides or "model." not in s]
    assert_refused(trainer(*small, *overrides), words)
    assert not (tmp_path / "run").exists(), "something was written"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ["is empty"]), (b"MZ\x00\x01" * 500, ["binary"]), (b"caf\xe9 " * 500, ["UTF-8"])],
)
def test_bad_text_file(trainer, small, tmp_path, content, words):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert_refused(trainer(*small, f"data.path={path}"), [str(path), *words])
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_refused(trainer, small, tmp_path):
    small = [s for s in small if "num_key_value_heads" not in s]
    result = trainer(
        *small,
        "model.model_type=bert",
        "~model.config.num_key_value_heads",
        "~model.config.tie_word_embeddings",
    )
    assert_refused(result, ["model=bert", "encoder"])
    assert not (tmp_path / "run").exists()


def test_deepspeed_absent(trainer, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    result = trainer(*small, "parallel=zero")
    assert_refused(result, ["parallel=zero", "pip install 'spotforge[deepspeed]'"])
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_model(trainer, small, trained):
    before = sorted(p.name for p in (trained / "checkpoints").iterdir())
    result = trainer(*small, "model.config.num_hidden_layers=3", "stop.steps=8")
    assert_refused(result, ["model.config.num_hidden_layers=3", "trained with 2"])
    result = trainer(
        *small,
        "model.config.num_hidden_layers=3",
        "allow_changes=[model.config,stop.steps]",
        "stop.steps=8",
    )
    assert_refused_last_line(result, ["checkpoint of another model", "layers.2"])
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == before


def assert_refused_last_line(result, words):
    result.err = result.err.splitlines()[-1]
    assert_refused(result, words)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("optim.lr=1e-4", "optim.lr"),
        ("seed=1", "seed"),
        ("global_batch_size=16", "global_batch_size"),
        ("data.max_seq_len=16", "data.max_seq_len"),
        ("stop.steps=9", "stop.steps"),
        ("data.validation_fraction=0.3", "data"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_a_resume_that_would_train_something_else(trainer, small, change, key):
    result = trainer(*small, change)
    assert_refused(result, [f"{key}=", "allow_changes=["])
    assert_refused(trainer(*small, change, "allow_changes=[no.such]"), ["allow_changes=no.such"])
    assert trainer(*small, change, f"allow_changes=[{key}]").code == 0


@pytest.mark.usefixtures("trained")
def test_resume_never_does_not_overwrite(trainer, small):
    assert_refused(trainer(*small, "resume=never"), ["resume=never", "run.name"])


def test_flipped_byte_in_prepared_data(trainer, small, tmp_path):
    small = [*small, f"data.cache_dir={tmp_path / 'cache'}"]
    assert trainer(*small).code == 0
    shutil.rmtree(tmp_path / "run")
    [shard] = (tmp_path / "cache").rglob("train-00000.bin")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert_refused(trainer(*small), [str(shard), "SHA-256"])
    assert not (tmp_path / "run").exists()


def test_pretrained_weights_that_do_not_match(trainer, small, tmp_path):
    config = AutoConfig.for_model(
        "llama",
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        tie_word_embeddings=True,
    )
    folder = tmp_path / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    config.num_hidden_layers = 3
    config.save_pretrained(folder)
    small = [s for s in small if not s.startswith("model.")]
    pretrained = ["model=pretrained", f"model.path={folder}", "data.tokenizer=train"]
    assert_refused(trainer(*small, *pretrained), ["model.path", "layers.2"])
    (folder / "model.safetensors").unlink()
    assert_refused(trainer(*small, *pretrained), ["model.path", "model.safetensors"])
    assert not (tmp_path / "run").exists()


def test_no_permission(trainer, small, tmp_path, monkeypatch):

    # Tests may run as root, who may write anywhere.
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != tmp_path and allowed(p, mode))
    assert_refused(trainer(*small), ["run.dir=", f"no permission to write in {tmp_path}"])
    assert not (tmp_path / "run").exists()
