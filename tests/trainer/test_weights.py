"""Weights are read and written as transformers itself reads and writes them."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM

from core import layout
from core.errors import ConfigError
from parallel.config import DdpConfig, Dtype, FsdpConfig, ZeroConfig
from parallel.optimizer_state import ADAMW
from parallel.strategy import persistent_buffers
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.families import zoo
from tests.small_run import SmallRun, saved_to
from tests.trainer.test_checkpoint import a_state, no_assets, tell_nobody
from trainer.checkpoint import (
    Located,
    committed,
    described_tensors,
    tensor_shapes,
)
from trainer.checkpointer import Checkpointer
from trainer.config import CheckpointConfig
from trainer.exporter import export_checkpoint
from trainer.model import Materializer, build_meta_model
from trainer.model_config import PathModelConfig
from trainer.resume import check_same_model, load_checkpoint
from trainer.run import _save_assets
from trainer.weights import canonical_names, saving_groups

CPU = torch.device("cpu")
# Experts fused in memory, renamed heads, biases and scales in buffers, and a frozen parameter.
FAMILIES = [
    "mixtral",
    "deepseek_v3",
    "gemma4_text",
    pytest.param("gpt_neox", marks=pytest.mark.long),
    pytest.param("ernie4_5_moe", marks=pytest.mark.long),
]


def config_of(folder):
    return PathModelConfig(path=str(folder), attn_implementation=None)


def materialized(folder):
    model = build_meta_model(config_of(folder), 1)
    materialize = Materializer(model, model, config_of(folder), 0, CPU)
    materialize(model)
    return model, materialize.stored_names


def saved_as(model, stored_names):
    """What an export would write of `model`."""
    canonical, state = canonical_names(model), model.state_dict()
    written = {}
    for group in saving_groups(
        build_meta_model(config_of(model.config._name_or_path), 1), stored_names
    ):
        made = group.convert(lambda name: state[canonical[name]])
        assert {n: t.shape for n, t in made.items()} == {
            n: t.shape for n, t in group.targets.items()
        }
        written |= made
    return written


def assert_same(found, right):
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", FAMILIES)
def test_as_transformers_reads_and_writes(name, tmp_path):
    folder = zoo.build(name, tmp_path / "model")
    right = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, stored_names = materialized(folder)
    assert_same(model.state_dict(), right.state_dict())
    assert_same(dict(model.named_buffers()), dict(right.named_buffers()))

    right.save_pretrained(tmp_path / "saved")
    assert_same(saved_as(model, stored_names), load_file(tmp_path / "saved/model.safetensors"))


@pytest.fixture
def llama(tmp_path):
    """A folder of a tied Llama."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(folder, change):
    """Stores what `change` makes of a folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def renamed(old, new):
    return lambda tensors: {n.replace(old, new): t for n, t in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [renamed("model.embed_tokens", "lm_head"), renamed("model.", "")],
    ids=["head", "base"],
)
def test_files_with_other_names(change, llama):
    """Tied weights may be stored under the head's name, and a bare model without its prefix."""
    right = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    rewrite(llama, change)
    assert_same(materialized(llama)[0].state_dict(), right.state_dict())


def test_a_prefix_that_was_read_is_written_again(tmp_path):
    """Transformers drops `language_model.` on load, and puts it back where it was."""
    config = Qwen3_5ForCausalLM.config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    folder = tmp_path / "model"
    Qwen3_5ForCausalLM(config).save_pretrained(folder)
    rewrite(folder, renamed("model.", "model.language_model."))
    right = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, stored_names = materialized(folder)
    assert_same(model.state_dict(), right.state_dict())
    assert_same(saved_as(model, stored_names), load_file(folder / "model.safetensors"))
    # Nobody knows of a prefix where there were no files.
    assert not any("language_model" in name for name in saved_as(model, None))


def test_a_single_file_goes_before_an_index(llama):
    right = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    stale = {n: t + 1 for n, t in load_file(llama / "model.safetensors").items()}
    save_file(stale, llama / "model-00001-of-00001.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(stale, "model-00001-of-00001.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(materialized(llama)[0].state_dict(), right.state_dict())


def with_float8(tensors):
    return {n: t.to(torch.float8_e4m3fn) if "q_proj" in n else t for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t | {"model.layers.0.self_attn.sink": torch.zeros(2)}, "self_attn.sink"),
        (lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}, "lm_head.weight"),
        (with_float8, "float8_e4m3fn"),
        (lambda t: t | {"model.norm.weight": torch.ones(16, dtype=torch.int8)}, "int8"),
        (lambda t: t | {"model.norm.weight": torch.ones(8)}, "model.norm.weight"),
        (lambda t: {n: v for n, v in t.items() if "norm" not in n}, "norm"),
    ],
    ids=["unexplained", "tied to another", "float8", "codes", "shape", "missing"],
)
def test_what_the_model_has_no_right_place_for_is_refused(change, word, llama):
    rewrite(llama, change)
    with pytest.raises(ConfigError, match=word):
        materialized(llama)


def test_what_older_releases_stored_and_newer_compute_is_passed_over(llama):
    right = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    rewrite(llama, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    model = materialized(llama)[0]
    assert_same(dict(model.named_buffers()), dict(right.named_buffers()))


def test_a_missing_buffer_is_refused(tmp_path):
    folder = zoo.build("gemma4_text", tmp_path / "model")
    rewrite(folder, lambda t: {n: v for n, v in t.items() if "layer_scalar" not in n})
    with pytest.raises(ConfigError, match="layer_scalar"):
        materialized(folder)


@pytest.mark.parametrize("weights", [True, False])
def test_a_quantized_model_is_no_model_to_train(weights, llama):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantized"):
        build_meta_model(PathModelConfig(path=str(llama), weights=weights), 1)


STRATEGIES = {"ddp": DdpConfig, "fsdp": FsdpConfig, "zero": lambda: ZeroConfig(stage=3)}


def trained_and_resumed(folder, first, second):
    """Trains a step under one strategy, and goes on with what it saved under another."""
    config = config_of(folder / "model")
    with join_world() as world:
        run = SmallRun(STRATEGIES[first](), world, model=config)
        for buffer in persistent_buffers(run.model).values():
            buffer.fill_(7.0)
        run.train(1)
        checkpointer = Checkpointer(
            CheckpointConfig(), *saved_to(folder / "checkpoints", world), no_assets, tell_nobody
        )
        checkpointer.save(run.strategy.state, a_state(1))
        checkpointer.wait()
        checkpointer.close()
        checkpoint = folder / "checkpoints/step-00000001"
        check_same_model(checkpoint, build_meta_model(config, 1), ADAMW, lambda line: None)
        losses = [run.train(1)]
        other = SmallRun(STRATEGIES[second](), world, model=config)
        load_checkpoint(Located(checkpoint), other.strategy, 1, world)
        other.step = 1
        losses.append(other.train(1))
        buffers = [t.tolist() for t in persistent_buffers(other.model).values()]
        return sorted(tensor_shapes(checkpoint)), losses, buffers


@pytest.mark.long
@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe"])
@pytest.mark.parametrize(("first", "second"), [("ddp", "zero"), ("fsdp", "ddp"), ("zero", "fsdp")])
def test_buffers_and_frozen_parameters_go_from_strategy_to_strategy(name, first, second, tmp_path):
    zoo.build(name, tmp_path / "model")
    gang = run_distributed(trained_and_resumed, 2, tmp_path, first, second)
    for stored, (went_on, resumed), buffers in gang:
        biases = [n for n in stored if "e_score_correction_bias" in n]
        assert biases and not [n for n in biases if n.startswith("optim.")]
        assert resumed[0] == pytest.approx(went_on[0], abs=1e-5)  # loss and gradient norm
        assert all(value == 7.0 for buffer in buffers for value in buffer)


def test_what_came_with_a_model_goes_with_it(llama, tmp_path):
    came = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}
    (llama / "generation_config.json").write_text(json.dumps(came))
    model, stored_names = materialized(llama)
    data = SimpleNamespace(tokenizer=zoo.byte_tokenizer())
    _save_assets(config_of(llama), model, data, stored_names, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == came
    assert json.loads((tmp_path / layout.STORED_NAMES).read_text()) == stored_names
    assert sorted(stored_names) == sorted(load_file(llama / "model.safetensors"))


@pytest.mark.long
def test_an_export_is_what_transformers_would_save(trainer, small, tmp_path):
    """Through a whole run: buffers, experts on disk one by one, and what came with the model."""
    folder = zoo.build("deepseek_v3", tmp_path / "model")
    came = {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(came))
    run_dir = tmp_path / "run"
    overrides = ["model=pretrained", f"model.path={folder}", "stop.steps=1", "optim.lr=1e-30"]
    overrides = [x for x in small if not x.startswith(("model", "data.tokenizer"))] + overrides
    overrides += ["schedule.warmup_steps=0", "optim.weight_decay=0", "monitoring.report=false"]
    result = trainer(*overrides, "export.at_end=true")
    assert result.code == 0, result
    export = run_dir / "export"
    assert json.loads((export / "generation_config.json").read_text()) == came
    found, right = (load_file(f / "model.safetensors") for f in (export, folder))
    assert_same(found, right)

    # A checkpoint of a release that did not save buffers.
    (checkpoint,) = committed(run_dir / "checkpoints")
    drop_buffers(checkpoint)
    (checkpoint / "huggingface/stored_names.json").unlink()
    export_checkpoint(Located(checkpoint), tmp_path / "again", Dtype.float32)
    assert_same(load_file(tmp_path / "again/model.safetensors"), right)


def drop_buffers(checkpoint):
    """Takes the biases of routers out of a checkpoint."""
    kept = {
        n: torch.empty_like(t, device="cpu")
        for n, t in described_tensors(checkpoint).items()
        if "e_score_correction_bias" not in n
    }
    Located(checkpoint).read(kept)
    for old in checkpoint.glob("__*"):
        old.unlink()
    with warnings.catch_warnings(action="ignore"):
        dcp.save(kept, checkpoint_id=checkpoint, no_dist=True)


@pytest.mark.parametrize(
    ("key", "said"), [("vocab_size", "set vocab_size=264"), ("hidden_size", "download both again")]
)
def test_only_a_vocabulary_may_be_the_config_that_is_to_be_mended(tmp_path, key, said):
    config = json.loads((zoo.build("llama", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: config[key] - 8}))
    with pytest.raises(ConfigError, match=said):
        materialized(tmp_path)
