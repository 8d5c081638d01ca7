"""Tiny models of every family, made from transformers' own configs.

A family's weights are scaled so that what is special about it changes the logits: soft caps bite,
router biases decide, windows are shorter than a test's sequence, and no persistent buffer stands at
its default. `make_without` takes the feature away again, so that a test can tell the two apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 264  # 3 special tokens, 256 bytes, and 5 that no text gives

# What most families call these. A family replaces what it calls otherwise.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Shorter than any sequence that a test should read.
WINDOW = 8

_SLIDING = ["sliding_attention", "full_attention"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}


@dataclass(frozen=True)
class Family:
    """A model type, its config, and what is special about it.

    Attributes:
        feature: What is special, in a few words.
        model_type: As transformers' `AutoConfig.for_model` takes it.
        config: Values beside the common ones. None leaves a common one out.
        scale: What the tensors whose name ends so are multiplied with.
        fill: The values of tensors whose name ends so: one number, or the first values of the
            flattened tensor (the others are 0).
        without: Config values under which the same weights compute another function.
        reset: As `fill`: values under which the model computes another function.
        remove: Takes the feature out of a model, where neither config nor weights can.
        attention: Transformers' implementation that is right, to compare with.
    """

    feature: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)
    fill: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    without: Mapping[str, Any] = field(default_factory=dict)
    reset: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    remove: Callable[[PreTrainedModel], None] = lambda model: None
    attention: str = "eager"


def _without_bloom_alibi(model: PreTrainedModel) -> None:
    for module in model.modules():
        if hasattr(module, "beta"):
            module.beta = 0.0


def _without_mpt_alibi(model: PreTrainedModel) -> None:
    made = model.base_model.build_mpt_alibi_tensor
    model.base_model.build_mpt_alibi_tensor = lambda *args, **kwargs: 0 * made(*args, **kwargs)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "grouped keys, llama3's rotary frequencies",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        without={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "mistral": Family(
        "a sliding window in every layer",
        "mistral",
        {"sliding_window": WINDOW, "head_dim": 16},
        without={"sliding_window": None},
    ),
    "qwen2": Family(
        "biases of queries, keys and values",
        "qwen2",
        {"tie_word_embeddings": True},
        scale={"q_proj.bias": 5.0, "k_proj.bias": 5.0, "v_proj.bias": 5.0},
        reset={"q_proj.bias": 0.0, "k_proj.bias": 0.0, "v_proj.bias": 0.0},
    ),
    "qwen3": Family(
        "norms of queries and keys",
        "qwen3",
        {"head_dim": 16},
        scale={"q_norm.weight": 2.0, "k_norm.weight": 2.0},
        reset={"q_norm.weight": 1.0, "k_norm.weight": 1.0},
    ),
    "qwen3_moe": Family(
        "experts whose weights are made to sum to 1",
        "qwen3_moe",
        {"head_dim": 8, "norm_topk_prob": True, **_EXPERTS},
        scale={"gate.weight": 4.0},
        without={"norm_topk_prob": False},
    ),
    "mixtral": Family(
        "experts, two of them for a token",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        scale={"gate.weight": 4.0},
        without={"num_experts_per_tok": 1},
    ),
    "olmoe": Family(
        "experts, norms of queries and keys over all heads",
        "olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
        scale={"gate.weight": 4.0},
        without={"norm_topk_prob": True},
    ),
    "gpt_oss": Family(
        "sinks, biases of the experts",
        "gpt_oss",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "intermediate_size": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
        scale={"router.weight": 4.0},
        fill={"sinks": (2.0, 1.0, 3.0, 2.0)},
        reset={"sinks": -100.0},
    ),
    "deepseek_v3": Family(
        "a bias that decides which experts are taken",
        "deepseek_v3",
        {
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "num_mtp_layers": 0,
        },
        scale={"gate.weight": 4.0},
        fill={"e_score_correction_bias": (5.0,)},
        reset={"e_score_correction_bias": 0.0},
    ),
    "gemma2": Family(
        "soft caps of attention and logits",
        "gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
        },
        scale={"q_proj.weight": 3.0, "k_proj.weight": 3.0},
        without={"attn_logit_softcapping": None},
    ),
    "gemma3_text": Family(
        "windows, and rotary bases of their own for them",
        "gemma3_text",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        scale={"q_norm.weight": 3.0},
        without={"layer_types": ["full_attention", "full_attention"]},
    ),
    "gemma4_text": Family(
        "layer scalars, which are buffers",
        "gemma4_text",
        {
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
        },
        fill={"layer_scalar": 0.1},
        reset={"layer_scalar": 1.0},
    ),
    "gpt2": Family(
        "learned positions, Conv1D",
        "gpt2",
        {
            **dict.fromkeys(("intermediate_size", "num_key_value_heads")),
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        },
        scale={"wpe.weight": 3.0},
        reset={"wpe.weight": 0.0},
    ),
    "opt": Family(
        "learned positions that start at 2",
        "opt",
        {
            **dict.fromkeys(("intermediate_size", "num_key_value_heads")),
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        scale={"embed_positions.weight": 3.0},
        reset={"embed_positions.weight": 0.0},
    ),
    "gpt_neox": Family(
        "fused queries, keys and values, rotary for a quarter",
        "gpt_neox",
        {"num_key_value_heads": None, **_NO_DROPOUT},
        without={"use_parallel_residual": False},
    ),
    "gptj": Family(
        "interleaved rotary for a part",
        "gptj",
        {
            **dict.fromkeys(("intermediate_size", "num_key_value_heads")),
            "rotary_dim": 4,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        },
        without={"rotary_dim": 8},
    ),
    "bloom": Family(
        "ALiBi",
        "bloom",
        {
            **dict.fromkeys(("intermediate_size", "num_key_value_heads")),
            "max_position_embeddings": None,
            **_NO_DROPOUT,
        },
        remove=_without_bloom_alibi,
    ),
    "mpt": Family(
        "ALiBi",
        "mpt",
        {
            **dict.fromkeys(
                ("intermediate_size", "num_key_value_heads", "max_position_embeddings")
            ),
            "expansion_ratio": 2,
            "max_seq_len": 256,
        },
        remove=_without_mpt_alibi,
    ),
    "falcon": Family(
        "grouped keys in one matrix with queries and values, blocks side by side",
        "falcon",
        {
            **dict.fromkeys(("intermediate_size", "num_key_value_heads")),
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "ffn_hidden_size": 64,
        },
        without={"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}},
    ),
    "falcon_rw": Family(
        "ALiBi",
        "falcon",
        {
            **dict.fromkeys(("intermediate_size", "num_key_value_heads")),
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "ffn_hidden_size": 64,
        },
        without={"alibi": False},
        # Eager attention of transformers 5.23 adds ALiBi to the scores and to the mask.
        attention="sdpa",
    ),
    "stablelm": Family(
        "norms of queries and keys by head, rotary for a quarter",
        "stablelm",
        {"qk_layernorm": True, "partial_rotary_factor": 0.5},
        without={"qk_layernorm": False},
    ),
    "phi3": Family(
        "fused queries, keys, values, gate and up",
        "phi3",
        {"sliding_window": WINDOW, **dict.fromkeys(("embd_pdrop", "resid_pdrop"), 0.0)},
        without={"sliding_window": None},
    ),
    "cohere": Family(
        "scaled logits, interleaved rotary, blocks side by side",
        "cohere",
        {"logit_scale": 0.5, "use_qk_norm": True},
        without={"logit_scale": 1.0},
    ),
    "granite": Family(
        "multipliers of embeddings, attention, residuals and logits",
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
        without={"residual_multiplier": 1.0},
    ),
    "mamba": Family(
        "a state instead of attention",
        "mamba",
        {"state_size": 4, "time_step_rank": 16},
        reset={"conv1d.weight": 0.0},
    ),
    "mamba2": Family(
        "a state by heads, in chunks",
        "mamba2",
        {
            **dict.fromkeys(("num_attention_heads", "num_key_value_heads")),
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "state_size": 8,
            "chunk_size": 8,
        },
        reset={"conv1d.weight": 0.0},
    ),
    "jamba": Family(
        "a state, attention and experts by turns",
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 4,
            "mamba_dt_rank": 16,
        },
        scale={"router.weight": 4.0},
        reset={"router.weight": 0.0},
    ),
    "zamba2": Family(
        "one attention block that two layers share",
        "zamba2",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": None,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "adapter_rank": 4,
            "use_mem_rope": True,
        },
        without={"use_mem_rope": False},
    ),
    "recurrent_gemma": Family(
        "a soft cap of the logits, recurrent blocks, a window",
        "recurrent_gemma",
        {
            "num_hidden_layers": 3,
            "logits_soft_cap": 4.0,
            "attention_window_size": WINDOW,
            "max_position_embeddings": None,
            "lru_width": 32,
            "num_key_value_heads": 1,
        },
        without={"logits_soft_cap": 1000.0},
    ),
    "qwen3_next": Family(
        "gated delta rule and gated attention by turns, experts",
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "shared_expert_intermediate_size": 32,
            **_EXPERTS,
        },
        scale={"gate.weight": 4.0},
        without={"norm_topk_prob": False},
    ),
    "falcon_h1": Family(
        "state and attention side by side, with multipliers",
        "falcon_h1",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "key_multiplier": 0.5,
            "ssm_multipliers": [0.5, 2.0, 0.5, 2.0, 0.5],
            "ssm_in_multiplier": 2.0,
            "attention_out_multiplier": 0.5,
        },
        without={"ssm_multipliers": [1.0, 1.0, 1.0, 1.0, 1.0]},
    ),
    "roberta": Family(
        "a head with a layer of its own, positions after the padding's",
        "roberta",
        {
            "is_decoder": True,
            "type_vocab_size": 1,
            "num_key_value_heads": None,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        reset={"lm_head.dense.weight": 0.0},
    ),
    "bert": Family(
        "a head with a layer of its own",
        "bert",
        {
            "is_decoder": True,
            "num_key_value_heads": None,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        reset={"predictions.transform.dense.weight": 0.0},
    ),
    "modernbert-decoder": Family(
        "a head with a layer of its own, a window",
        "modernbert-decoder",
        {
            "num_key_value_heads": None,
            "local_attention": 2 * WINDOW,
            "layer_types": _SLIDING,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        reset={"lm_head.dense.weight": 0.0},
    ),
    "apertus": Family(
        "an activation with weights and buffers",
        "apertus",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        fill={"alpha_p": 2.0, "alpha_n": 1.5, "act_fn.beta": 0.8},
        reset={"act_fn.beta": 0.5},
    ),
    "ernie4_5_moe": Family(
        "a bias that decides which experts are taken",
        "ernie4_5_moe",
        {
            "moe_intermediate_size": 32,
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        scale={"gate.weight": 4.0},
        fill={"e_score_correction_bias": (1.0, 1.0)},
        reset={"e_score_correction_bias": 0.0},
    ),
    "lfm2": Family(
        "short convolutions and attention by turns",
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        scale={"conv.conv.weight": 4.0},
        reset={"conv.conv.weight": 0.0},
    ),
    "smollm3": Family(
        "layers without positions",
        "smollm3",
        {"no_rope_layers": [1, 0], "use_sliding_window": False},
        without={"no_rope_layers": [1, 1]},
    ),
    "starcoder2": Family(
        "a sliding window, norms and matrices with biases",
        "starcoder2",
        {
            "sliding_window": WINDOW,
            **dict.fromkeys(("embedding_dropout", "residual_dropout", "attention_dropout"), 0.0),
        },
        without={"sliding_window": None},
    ),
}


def build(name: str, folder: Path) -> Path:
    """Saves a family's model, tokenizer and generation config, as transformers writes them.

    Args:
        name: A key of `FAMILIES`.
        folder: Where to; it is made.

    Returns:
        The folder.
    """
    model = make(name)
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, do_sample=False
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make(name: str) -> PreTrainedModel:
    """Makes a family's model in float32 and eval mode, the same one each time."""
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_config(family, {}), dtype=torch.float32)
        _scale(model, family)
    return model.eval()


def make_without(name: str) -> PreTrainedModel:
    """Makes a family's model, with the same weights, but without its feature."""
    family = FAMILIES[name]
    whole = make(name)
    config = _config(family, family.without)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # A feature that was taken away may have had weights, which are left over here.
    model.load_state_dict(whole.state_dict(), strict=False)
    with torch.no_grad():
        _fill(model, family.reset)
    family.remove(model)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of bytes, after <pad>, <bos> and <eos>: 259 tokens, and any text fits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def _config(family: Family, changes: Mapping[str, Any]) -> PreTrainedConfig:
    values = {**_COMMON, **family.config, **changes}
    # None stands for "this family has no such key" only where the key is a common one.
    values = {
        key: value
        for key, value in values.items()
        if value is not None or key not in _COMMON or key in changes
    }
    return AutoConfig.for_model(family.model_type, **values)


@torch.no_grad()
def _scale(model: PreTrainedModel, family: Family) -> None:
    for name, parameter in model.named_parameters():
        # Norms and biases too: what stands at 0 or 1 hides that it was not read.
        parameter.add_(torch.randn_like(parameter) * 0.1)
        if any(part in name for part in _ATTENTION):
            parameter.mul_(2.0)
        for ending, factor in family.scale.items():
            if name.endswith(ending):
                parameter.mul_(factor)
    # Logits far enough apart that the largest one stays the largest in another order of sums. Where
    # the embeddings are the head, too, it would only make each token follow itself.
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        head.mul_(3.0)
    _fill(model, family.fill)


# Queries and keys that differ enough for attention to be other than a mean.
_ATTENTION = ("q_proj.weight", "k_proj.weight", "query_key_value.weight", "c_attn.weight", "Wqkv")


def _fill(model: nn.Module, values: Mapping[str, float | tuple[float, ...]]) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for ending, value in values.items():
        found = [tensor for name, tensor in tensors if name.endswith(ending)]
        assert found, f"no tensor ends with {ending}"
        for tensor in found:
            first = value if isinstance(value, tuple) else (value,) * tensor.numel()
            tensor.zero_()
            tensor.view(-1)[: len(first)] = torch.tensor(first, dtype=tensor.dtype)
