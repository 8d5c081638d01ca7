"""Computes the size of a model from its configuration: for the planner, which imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from trainer.config import DistillConfig, TrainerConfig
from trainer.model_config import NamedModelConfig, PathModelConfig

# Defaults of transformers for fields that a config does not set, by architecture.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class ModelShape:
    """Holds the sizes of a decoder.

    Attributes:
        family: Transformers' name of the architecture.
        vocab_size: Number of rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the MLP.
        num_layers: Number of decoder blocks.
        qkv_size: Number of outputs of the query, key and value projections together.
        attention_size: Number of inputs of the output projection: heads times head size.
        num_parameters: Number of all parameters; a tied output layer counts once.
        num_parameters_in_matmuls: Number without the embedding, unless it is also the output layer.
        num_block_parameters: Number of parameters of one decoder block.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    qkv_size: int
    attention_size: int
    num_parameters: int
    num_parameters_in_matmuls: int
    num_block_parameters: int


def model_shape(config: TrainerConfig) -> ModelShape:
    """Returns the sizes of the model that a run would build.

    If a tokenizer is to be trained, its vocabulary is assumed to have the largest allowed size.

    Raises:
        ConfigError: The size of this architecture is not known here, or there is no `config.json`.
    """
    model = config.model
    if isinstance(model, NamedModelConfig):
        fields = dict(model.config)
        vocab_size = model.vocab_size or _tokenizer_vocab_size(config)
        # The model rounds a tokenizer's size up in the same way (trainer/model.py).
        fields |= {"vocab_size": -(-vocab_size // 64) * 64 if not model.vocab_size else vocab_size}
        return _shape_of(model.model_type, fields, "model.model_type")
    assert isinstance(model, PathModelConfig)
    fields = _config_json(model.path, model.revision, "model.path")
    return _shape_of(str(fields.get("model_type")), fields, "model.path")


def teacher_shape(config: TrainerConfig) -> ModelShape | None:
    """Returns the sizes of the teacher of a distillation; None without one.

    Raises:
        ConfigError: See `model_shape`.
    """
    objective, key = config.objective, "objective.teacher"
    if not isinstance(objective, DistillConfig):
        return None
    fields = _config_json(objective.teacher, objective.revision, key)
    return _shape_of(str(fields.get("model_type")), fields, key)


def _shape_of(family: str, fields: dict[str, Any], key: str) -> ModelShape:
    if family not in _DEFAULTS:
        rule = "has no size that is known without building it"
        raise ConfigError(key, family, rule, f"use one of {', '.join(sorted(_DEFAULTS))}")
    fields = fields | {"model_type": family}
    fields = _DEFAULTS[family] | {name: v for name, v in fields.items() if v is not None}
    return _gpt2(fields) if family == "gpt2" else _llama(fields, family)


def _llama(fields: dict[str, Any], family: str) -> ModelShape:
    """Returns the sizes of Llama and models built like it: RMS norms, SwiGLU, grouped queries."""
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim", hidden // heads)
    kv = fields.get("num_key_value_heads", heads) * head_dim
    queries = heads * head_dim
    matrices = hidden * (queries + 2 * kv) + queries * hidden + 3 * hidden * inner
    vectors = 2 * hidden
    if family == "qwen2":  # always has biases, but none on the output projection
        vectors += queries + 2 * kv
    elif fields.get("attention_bias", False) and family != "mistral":
        vectors += queries + 2 * kv + hidden
    if fields.get("mlp_bias", False) and family == "llama":
        vectors += 2 * inner + hidden
    if family == "qwen3":  # norms of queries and keys
        vectors += 2 * head_dim
    return _shape(fields, hidden, inner, queries + 2 * kv, queries, matrices, vectors, hidden)


def _gpt2(fields: dict[str, Any]) -> ModelShape:
    hidden = fields["n_embd"]
    inner = fields.get("n_inner", 4 * hidden)
    fields = fields | {"num_hidden_layers": fields["n_layer"]}
    matrices = 4 * hidden**2 + 2 * hidden * inner
    vectors = 4 * hidden + (3 * hidden + hidden) + (inner + hidden)  # norms; attention; MLP
    positions = fields["n_positions"] * hidden
    shape = _shape(fields, hidden, inner, 3 * hidden, hidden, matrices, vectors, 2 * hidden)
    return ModelShape(
        **vars(shape)
        | {
            "num_parameters": shape.num_parameters + positions,
            "num_parameters_in_matmuls": shape.num_parameters_in_matmuls + positions,
        }
    )


def _shape(
    fields: dict[str, Any],
    hidden: int,
    inner: int,
    qkv: int,
    queries: int,
    matrices: int,
    vectors: int,
    last_norm: int,
) -> ModelShape:
    layers, embedding = fields["num_hidden_layers"], fields["vocab_size"] * hidden
    tied = fields.get("tie_word_embeddings", False)
    return ModelShape(
        family=fields["model_type"],
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        qkv_size=qkv,
        attention_size=queries,
        num_parameters=layers * (matrices + vectors) + embedding * (1 if tied else 2) + last_norm,
        num_parameters_in_matmuls=layers * matrices + embedding,
        num_block_parameters=matrices + vectors,
    )


def _tokenizer_vocab_size(config: TrainerConfig) -> int:
    data = config.data
    file = Path(data.tokenizer).expanduser() / "tokenizer.json"
    if data.tokenizer in ("auto", "train"):
        return int(data.tokenizer_vocab_size)
    if not file.is_file():
        rule = "has a vocabulary whose size is not known without loading it"
        fix = "give a folder with tokenizer.json, or set model.vocab_size"
        raise ConfigError("data.tokenizer", data.tokenizer, rule, fix)
    content = json.loads(file.read_text(encoding="utf-8"))
    added = [token["id"] for token in content.get("added_tokens", ())]
    return int(max([*content["model"]["vocab"].values(), *added])) + 1


def _config_json(name: str, revision: str | None, key: str) -> dict[str, Any]:
    folder = Path(name).expanduser()
    try:
        path = folder / "config.json"
        if not folder.is_dir():
            from huggingface_hub import try_to_load_from_cache  # only for a name on the hub

            cached = try_to_load_from_cache(name, "config.json", revision=revision)
            path = Path(cached) if isinstance(cached, str) else path
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:  # missing, not JSON, or not a valid repository name
        rule = "has no config.json that can be read here"
        fix = "give a folder, or load the model once so that it is in the hub's cache"
        raise ConfigError(key, name, rule, fix) from e
    return fields
