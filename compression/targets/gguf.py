"""GGUF: one file for llama.cpp and programs built on it. Codes are stored as they were chosen.

A block of 32 weights of a row has one scale in float16: `Q4_0` for 4 bits, `Q8_0` for 8. A scale of
more weights is repeated. Unquantized matrices keep the result's type, vectors become float32.
Layouts and names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's
convert_hf_to_gguf.py.

Shapes: O outputs, I inputs of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compression.quantizer import Quantized
from compression.result import Result
from compression.scheme import Activation, Number, Scheme
from compression.targets.packing import copy_assets
from compression.targets.vocabulary import read_vocabulary
from core.errors import ConfigError, MissingExtraError

_FILE = "model.gguf"
_BLOCK = 32  # number of weights that share a scale
_BLOCK_TYPES = {4: "Q4_0", 8: "Q8_0"}
_INSTALL = "pip install 'spotforge[compression]'"
# transformers' name -> llama.cpp's name, for architectures that both compute in the same way.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# Settings of these architectures that are written to the file, or visible in its tensors.
_WRITTEN = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}
_ROPE_WRITTEN = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor"),
    *("high_freq_factor", "original_max_position_embeddings"),
}
# Settings that do not change any logits.
_OF_NO_LOGIT = {
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range"),
    *(
        "pretraining_tp",
        "id2label",
        "label2id",
        "problem_type",
        "return_dict",
        "chunk_size_feed_forward",
    ),
    *("output_attentions", "output_hidden_states", "is_encoder_decoder", "_name_or_path"),
}

Array = np.ndarray[Any, Any]


def check(schemes: set[Scheme], key: str) -> None:
    """Raises ConfigError for codes that no block type of GGUF holds exactly."""
    try:
        import gguf  # noqa: F401
    except ImportError as e:
        raise MissingExtraError(key, "gguf", "gguf is not installed", _INSTALL) from e
    for scheme in schemes:
        if scheme.number is Number.float8 or scheme.activation is not Activation.none:
            rule = "GGUF has no float8, and llama.cpp decides itself how inputs are rounded"
            raise ConfigError(key, "gguf", rule, "set number=int activation=none")
        if scheme.bits not in _BLOCK_TYPES:
            rule = f"GGUF blocks with a scale and no minimum hold 4 or 8 bits, not {scheme.bits}"
            raise ConfigError(key, "gguf", rule, "set bits=4 or bits=8")
        if not scheme.symmetric:
            rule = "GGUF stores zero_point * scale in float16, which would round it a second time"
            raise ConfigError(key, "gguf", rule, "set symmetric=true")
        if scheme.group_size is not None and scheme.group_size % _BLOCK:
            rule = f"GGUF has a scale for every {_BLOCK} weights, not for {scheme.group_size}"
            raise ConfigError(key, "gguf", rule, f"set group_size={_BLOCK}")


def check_parent(parent: Path, layers: Collection[str], schemes: set[Scheme], key: str) -> None:
    """Raises ConfigError for a model that llama.cpp would run differently, or not at all.

    Every setting of its config that differs from transformers' default must be one that is written,
    or one that changes no logits.

    Args:
        parent: Folder of the model.
        layers: Names of the layers that will have codes.
        schemes: Schemes of the codes.
        key: Key of the setting, for errors.
    """
    config: Any = AutoConfig.from_pretrained(parent)
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        rule = f"{config.model_type} is not one of the supported architectures: {known}"
        raise ConfigError(key, "gguf", rule, "use target=compressed_tensors")
    fields = {
        "hidden_act": (config.hidden_act, ("silu",)),
        "rope_type": (config.rope_parameters["rope_type"], ("default", "llama3")),
        "partial_rotary_factor": (config.rope_parameters.get("partial_rotary_factor", 1.0), (1.0,)),
    }
    if config.model_type == "qwen3":
        # llama.cpp's qwen3 reads no biases of q, k and v.
        fields["attention_bias"] = (config.attention_bias, (False,))
    usual = type(config)().to_dict()
    described = config.to_dict()
    fields |= {
        name: (described.get(name), (value,))
        for name, value in usual.items()
        if name not in _WRITTEN and name not in _OF_NO_LOGIT
    }
    fields |= {
        f"rope_parameters.{name}": (value, ())
        for name, value in config.rope_parameters.items()
        if name not in _ROPE_WRITTEN
    }
    for name, (value, allowed) in fields.items():
        if value not in allowed:
            rule = f"llama.cpp's {config.model_type} does not support {name}={value}"
            raise ConfigError(key, "gguf", rule, "use target=compressed_tensors")
    window = _window(config)
    if window is not None and window < config.max_position_embeddings:
        rule = (
            f"each token of this model sees the last {window} of up to "
            f"{config.max_position_embeddings} tokens, in llama.cpp it sees all of them"
        )
        fix = (
            "use target=compressed_tensors, or compress a copy whose config.json says "
            f"max_position_embeddings={window}: up to there both compute the same"
        )
        raise ConfigError(key, "gguf", rule, fix)
    heads = config.num_attention_heads * _head_dim(config)
    widths = {"down_proj": config.intermediate_size, "o_proj": heads}
    for name in layers:
        kind = name.rpartition(".")[2]
        width = widths.get(kind, config.hidden_size)
        if width % _BLOCK:
            rule = f"the {width} inputs of {name} are not a multiple of {_BLOCK}"
            raise ConfigError(key, "gguf", rule, f"leave it out: layers.exclude=['*.{kind}']")
    read_vocabulary(parent, config.vocab_size, key)


def pack(result: Result, source: Path, out: Path) -> None:
    """Writes the folder `out`: the GGUF file, with config and tokenizer as separate files."""
    import gguf

    config: Any = AutoConfig.from_pretrained(source)
    described = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # A Mistral is a Llama within its window; `check_parent` refuses longer contexts.
    if _ARCHITECTURES[config.model_type] == "llama":
        described |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        described.pop("sliding_window", None)
    copy_assets(source, out, described, result.dtype)

    writer = gguf.GGUFWriter(out / _FILE, _ARCHITECTURES[config.model_type])
    writer.add_name(source.name)
    writer.add_context_length(config.max_position_embeddings)
    _add_shape(writer, config)
    # llama.cpp shows this as the type of the file: that of most layers.
    bits = [scheme.bits for scheme in result.schemes().values()]
    kind = f"MOSTLY_{_BLOCK_TYPES[max(bits, key=bits.count)]}" if bits else "GUESSED"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, source, config.vocab_size)
    for name, kind, data in _tensors(result, config):
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # Tensors are made a second time, so that memory holds only one of them.
    for _, _, data in _tensors(result, config):
        writer.write_tensor_data(data)
    writer.close()


def load(folder: Path) -> Any:
    """Returns the artifact as a model of transformers: dequantized, float32."""
    config = AutoConfig.from_pretrained(folder)  # the config in the GGUF file lacks head_dim
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_FILE, config=config, dtype=torch.float32
    ).eval()


def runner(folder: Path, dtype: torch.dtype | None = None) -> None:
    """Returns None: transformers can load the file, but llama.cpp is what runs it."""


def check_layer_times(key: str) -> None:
    """Raises ConfigError, since the kernels are llama.cpp's."""
    rule = "llama.cpp runs the model, and reports no time of a single layer"
    raise ConfigError(key, "gguf", rule, "set a budget of bits or MB, or another target")


def layer_bytes(folder: Path, layers: set[str]) -> int:
    """Returns the bytes that store the weights of some layers, including scales."""
    import gguf

    names = _Names(AutoConfig.from_pretrained(folder))
    wanted = {names.of(f"{layer}.weight") for layer in layers}
    tensors = gguf.GGUFReader(folder / _FILE).tensors
    return sum(int(tensor.n_bytes) for tensor in tensors if tensor.name in wanted)


def pack_blocks(value: Quantized) -> Array:
    """Returns codes and scales as `Q4_0` or `Q8_0`: bytes (O, I / 32 * bytes of a block)."""
    num_outputs, num_inputs = value.codes.shape
    num_blocks = num_inputs // _BLOCK
    scales = value.scales.repeat_interleave(num_blocks // value.scales.shape[1], 1)
    halves = scales.numpy().astype("<f2")
    assert np.array_equal(halves.astype(np.float32), scales.numpy()), "a scale is not a float16"
    codes = value.codes.view(num_outputs, num_blocks, _BLOCK).numpy()
    # Q4_0 stores the first half of a block in the low bits, the second half in the high bits.
    if value.scheme.bits == 4:
        nibbles = (codes + 8).astype(np.uint8)
        codes = nibbles[..., : _BLOCK // 2] | nibbles[..., _BLOCK // 2 :] << 4
    parts = halves[..., np.newaxis].view(np.uint8), codes.view(np.uint8)
    return np.concatenate(parts, -1).reshape(num_outputs, -1)


class _Names:
    """Names of tensors in GGUF."""

    def __init__(self, config: Any) -> None:
        import gguf

        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        number = numbers[_ARCHITECTURES[config.model_type]]
        self._map = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def of(self, name: str) -> str:
        """Returns llama.cpp's name of a tensor, such as `blk.0.attn_q.weight`."""
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return str(found)


def _tensors(result: Result, config: Any) -> Iterator[tuple[str, str, Array]]:
    """Yields name, type and bytes of each tensor."""
    names = _Names(config)
    for path in result.files():
        for name, value in result.read(path):
            order = _row_order(name, config)
            if isinstance(value, Quantized):
                data = pack_blocks(value)[order]
                yield names.of(name), _BLOCK_TYPES[value.scheme.bits], data
            elif value.ndim == 1 or value.dtype is torch.float32:
                yield names.of(name), "F32", value.float().numpy()[order].view(np.uint8)
            else:
                yield names.of(name), "BF16", value.view(torch.uint8).numpy()[order]
    factors = _rope_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", "F32", factors.numpy().view(np.uint8)


def _row_order(name: str, config: Any) -> Any:
    """Returns the order in which llama.cpp stores the rows of a tensor.

    llama.cpp's `llama` rotates neighbouring rows of a head, transformers rotates its two halves:
    the rows of queries and keys are interleaved.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    layer = name.split(".")[-2]
    if _ARCHITECTURES[config.model_type] != "llama" or layer not in heads:
        return slice(None)
    rows = torch.arange(heads[layer] * _head_dim(config))
    return rows.view(heads[layer], 2, -1).transpose(1, 2).flatten().numpy()


def _rope_factors(config: Any) -> Tensor | None:
    """Returns Llama 3.1's divisors of rotary frequencies (head_dim / 2); None if all are 1."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters["rope_type"] == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _head_dim(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    factors: Tensor = config.rope_parameters["rope_theta"] ** -exponents / scaled
    return factors


def _add_shape(writer: Any, config: Any) -> None:
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: Any, source: Path, vocab_size: int) -> None:
    vocabulary = read_vocabulary(source, vocab_size, "target")
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(True)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
    ids = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unknown": writer.add_unk_token_id,
        "padding": writer.add_pad_token_id,
    }
    for name, index in vocabulary.special.items():
        ids[name](index)
    writer.add_add_bos_token(vocabulary.adds["bos"])
    writer.add_add_eos_token(vocabulary.adds["eos"])


def _window(config: Any) -> int | None:
    """Returns the number of tokens that some layer attends to; None: all of them."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def _head_dim(config: Any) -> int:
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads
