"""Sizes that are computed, against models that are built."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core.errors import ConfigError
from trainer.command import TRAINER
from trainer.shape import model_shape


def composed(*words):
    return TRAINER.compose(words)


def built(model_type, **fields):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))


def assert_agrees(shape, model):
    embedding = model.get_input_embeddings().weight
    tied = model.config.tie_word_embeddings
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.num_parameters_in_matmuls == sum(
        p.numel() for p in model.parameters() if p.ndim >= 2 and (p is not embedding or tied)
    )
    assert shape.num_layers == model.config.num_hidden_layers
    assert shape.hidden_size == model.config.hidden_size


@pytest.mark.parametrize("name", ["llama_1b", "llama_7b", "llama_8b", "qwen3_0_6b", "gpt2", "tiny"])
def test_the_models_of_the_project(name):
    config = composed(f"model={name}")
    sizes = {"vocab_size": config.model.vocab_size or 4096}
    assert_agrees(
        model_shape(config), built(config.model.model_type, **config.model.config, **sizes)
    )


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
        ("llama", {"head_dim": 24, "tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 4}),
        ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("qwen3", {"num_key_value_heads": 4}),
        ("qwen3", {"attention_bias": True, "head_dim": 16, "num_key_value_heads": 4}),
    ],
)
def test_families(tmp_path, family, fields):
    sizes = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        **fields,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    shape = model_shape(composed("model=config", f"model.path={tmp_path}"))
    assert_agrees(shape, built(family, **sizes))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_what_a_config_leaves_out(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert_agrees(model_shape(composed("model=config", f"model.path={tmp_path}")), built(family))


def test_the_vocabulary_of_a_tokenizer_on_disk(tmp_path):
    vocab = {str(i): i for i in range(1000)}
    content = {"model": {"vocab": vocab}, "added_tokens": [{"id": 1000}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert model_shape(composed(f"data.tokenizer={tmp_path}")).vocab_size == 1024


def test_what_is_not_known_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="model_type=bert: its size is not known"):
        model_shape(composed("model.model_type=bert"))
    with pytest.raises(ConfigError, match="has no config.json"):
        model_shape(composed("model=config", f"model.path={tmp_path}"))
    with pytest.raises(ConfigError, match=r"data.tokenizer=some/name: .*model.vocab_size"):
        model_shape(composed("data.tokenizer=some/name"))
