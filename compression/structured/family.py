"""The models that can be made smaller: the Llama family, recognized by structure, not by name.

These are llama, mistral, qwen2, qwen3 and all other models with these parameters and no others,
plain linear layers, and RMSNorms without an offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compression.stream import BlockStream
from core.errors import ConfigError

# Names of the dimensions of a parameter.
Axes = tuple[str, ...]

_BLOCK: dict[str, Axes] = {
    "input_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("key", "hidden"),
    "self_attn.v_proj.weight": ("key", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "post_attention_layernorm.weight": ("hidden",),
    "mlp.gate_proj.weight": ("mlp", "hidden"),
    "mlp.up_proj.weight": ("mlp", "hidden"),
    "mlp.down_proj.weight": ("hidden", "mlp"),
}
_OPTIONAL: dict[str, Axes] = {
    "self_attn.q_norm.weight": ("head_dim",),
    "self_attn.k_norm.weight": ("head_dim",),
} | {name.replace(".weight", ".bias"): axes[:1] for name, axes in _BLOCK.items() if len(axes) == 2}
_FIX = "choose a model built as llama, mistral, qwen2 or qwen3 are, or prune with prune_wanda"


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the family.

    blocks: Number of decoder blocks.
        heads: Number of key-value heads.
        queries: Number of query heads that share a key-value head.
        head_dim: Width of a head.
        mlp: Width between up and down projection.
        hidden: Number of channels of the residual stream.
        vocab: Number of rows of the embedding.
        vocab: Rows of the embedding.
    """

    blocks: int
    heads: int
    queries: int
    head_dim: int
    mlp: int
    hidden: int
    vocab: int

    def size(self, axis: str) -> int:
        """Returns the size of a named dimension of a parameter."""
        key = self.heads * self.head_dim
        named = {"key": key, "query": key * self.queries}
        return named[axis] if axis in named else int(getattr(self, axis))

    def config(self) -> dict[str, int]:
        """Returns the sizes under their names in config.json."""
        return {
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads * self.queries,
            "num_key_value_heads": self.heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp,
            "hidden_size": self.hidden,
        }


@dataclass(frozen=True)
class Family:
    """Structure of a model of the family.

    Attributes:
        shape: Sizes of the model.
        block: Dimensions of each parameter of a block.
        rest: Dimensions of each parameter outside the blocks, without a tied head.
    """

    shape: Shape
    block: dict[str, Axes]
    rest: dict[str, Axes]

    def num_params(self, shape: Shape) -> int:
        """Returns the number of parameters of a model of other sizes; a tied head counts once."""

        def count(parameters: dict[str, Axes]) -> int:
            return sum(math.prod(map(shape.size, axes)) for axes in parameters.values())

        return shape.blocks * count(self.block) + count(self.rest)


def recognize(stream: BlockStream) -> Family:
    """Returns the structure of a model of the family.

    Args:
        stream: Stream of the model, with no block read yet.

    Raises:
        ConfigError: The model does not belong to the family.
    """
    config = stream.model.config
    if config.get_text_config() is not config:
        raise _strange(stream, "its language model is a part of another model")
    block = _block_parameters(stream)
    heads = config.num_key_value_heads or config.num_attention_heads
    queries = config.num_attention_heads // heads
    # Before a config knows `head_dim`, heads share the hidden size.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = Shape(
        blocks=len(stream.blocks),
        heads=heads,
        queries=queries,
        head_dim=head_dim,
        mlp=config.intermediate_size,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
    )
    family = Family(shape, block, _rest_parameters(stream))
    _check_sizes(stream, stream.model, family, shape)
    return family


def check_buildable(stream: BlockStream, family: Family, shape: Shape, key: str) -> None:
    """Raises ConfigError if transformers cannot build the smaller model from its config.

    Args:
        stream: Stream of the parent.
        family: Structure of the parent.
        shape: Sizes of the smaller model.
        key: Key of the step, for errors.
    """
    config = stream.model.config
    # Lists with an entry for each layer will be cut to the blocks that stay. These are not known
    # yet, and the entries do not matter here.
    lists = {key: value[: shape.blocks] for key, value in per_layer(config).items()}
    try:
        smaller = type(config).from_dict(config.to_dict() | shape.config() | lists)
    except StrictDataclassError as e:
        rule = f"transformers refuses it: {str(e).strip().splitlines()[-1].strip().rstrip('.')}"
        fix = "choose other sizes, e.g. by shares of heads and hidden together"
        raise ConfigError(f"{key}.heads", shape.heads, rule, fix) from e
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(smaller)
    _check_sizes(stream, model, family, shape)


def per_layer(config: Any) -> dict[str, list[Any]]:
    """Returns the settings of a transformers config that have an entry for each layer."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if isinstance(value, list) and "layer" in key and len(value) == config.num_hidden_layers
    }


def _block_parameters(stream: BlockStream) -> dict[str, Axes]:
    first = {name for name, _ in stream.blocks[0].named_parameters()}
    for missing in _BLOCK.keys() - first:
        raise _strange(stream, f"its blocks have no {missing}")
    for name in sorted(first - _BLOCK.keys() - _OPTIONAL.keys()):
        raise _strange(stream, f"its blocks have a parameter {name}, which is not supported")
    for block in stream.blocks:
        if {name for name, _ in block.named_parameters()} != first:
            raise _strange(stream, "its blocks differ from each other")
        for module in block.modules():
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
                raise _strange(stream, f"{type(module).__name__} is not a plain linear layer")
    return {name: axes for name, axes in (_BLOCK | _OPTIONAL).items() if name in first}


def _rest_parameters(stream: BlockStream) -> dict[str, Axes]:
    embedding, head = stream.model.get_input_embeddings(), stream.model.get_output_embeddings()
    if type(embedding) is not nn.Embedding:
        raise _strange(stream, f"{type(embedding).__name__} scales by the hidden size")
    found: dict[str, Axes] = {}
    for module in stream.rest():
        if module is head and stream.is_tied:
            continue
        for local, parameter in module.named_parameters(recurse=False):
            name = f"{stream.name_of(module)}.{local}"
            if module in (embedding, head) and local == "weight":
                found[name] = ("vocab", "hidden")
            elif local == "weight" and parameter.ndim == 1:
                found[name] = ("hidden",)
                _check_norm(stream, module)
            else:
                raise _strange(stream, f"it has a parameter {name}, which is not supported")
    return found


def _check_norm(stream: BlockStream, norm: nn.Module) -> None:
    """Raises ConfigError unless a norm is x / rms(x) * weight, of the same type as in the blocks.

    Only then can a channel that is always zero be removed without a change of the others, except
    for their number.
    """
    if type(norm) is not type(stream.blocks[0].get_submodule("input_layernorm")):
        raise _strange(stream, "its last norm differs from those in the blocks")
    weight: Any = norm.weight
    # Far from zero mean, so that a norm that subtracts the mean (LayerNorm) shows.
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) * 100 + 50
    wanted = x * x.square().mean(-1, keepdim=True).rsqrt() * weight
    with torch.no_grad():
        found: Tensor = norm(x)
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4):
        raise _strange(stream, f"{type(norm).__name__} is not a plain RMSNorm")


def _check_sizes(stream: BlockStream, model: Any, family: Family, shape: Shape) -> None:
    named = dict(model.named_parameters())
    axes_of = dict(family.rest)
    for index in range(shape.blocks):
        prefix = stream.names[0].rpartition(".")[0]
        axes_of |= {f"{prefix}.{index}.{name}": axes for name, axes in family.block.items()}
    for name, axes in axes_of.items():
        wanted = tuple(map(shape.size, axes))
        if name not in named or tuple(named[name].shape) != wanted:
            found = tuple(named[name].shape) if name in named else "absent"
            raise _strange(stream, f"{name} is {found}, its config says {wanted}")


def _strange(stream: BlockStream, rule: str) -> ConfigError:
    return ConfigError("model", stream.model.config.model_type, rule, _FIX)
