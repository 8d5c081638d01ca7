"""GGUF read back: by its own library, by transformers, and what is refused before any work."""

import json
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from compression.__main__ import main
from compression.config import CompressionConfig, ParentConfig
from compression.layerwise import compress
from compression.methods.rounding import RoundToNearest
from compression.quantizer import Quantized, fit_grid
from compression.recipe import GptqConfig, RoundConfig
from compression.result import Result
from compression.scheme import Activation, Number, Scheme
from compression.source import choose_layers
from compression.stream import BlockStream
from compression.targets.gguf import check, check_parent, layer_bytes, load, pack, pack_blocks
from compression.targets.vocabulary import (
    BYTE,
    CONTROL,
    SPLIT_LLAMA,
    SPLIT_QWEN,
    UNKNOWN,
    UNUSED,
    read_vocabulary,
)
from core.errors import ConfigError
from core.settings.rules import check_settings
from parallel.config import Dtype
from trainer.data.tokenizer import train_tokenizer

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)
LLAMA_3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
TEXTS = ["the cat sat on a mat, and the dogs ate 12 fish.\n", "far dogs ran while the cat sat\n"]


def save_parent(folder, model_type="llama", **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim == 2 else parameter.add_(
                torch.randn_like(parameter) / 10
            )
    model.save_pretrained(folder)
    train_tokenizer(TEXTS * 20, 300).save_pretrained(folder)
    return folder


def compressed(parent, folder, scheme, dtype=torch.bfloat16, exclude=()):
    """A result, its artifact, and the names of the layers in codes."""
    layers = choose_layers(BlockStream(parent), ["*"], list(exclude))
    check({scheme} if scheme else set(), "target")
    check_parent(parent, layers, set(), "target")
    for name in ("result", "artifact"):
        (folder / name).mkdir(parents=True)
    result = Result(folder / "result", dtype, torch.float16)
    methods = {"x": RoundToNearest(scheme)} if scheme else {}
    compress(parent, methods, layers, None, result, lambda done, total: None)
    pack(result, parent, folder / "artifact")
    return result, folder / "artifact", set(layers)


@torch.no_grad()
def logits_of_result(parent, result, input_ids):
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
    result.put_into("model", model.model)
    if not model.config.tie_word_embeddings:
        result.put_into("lm_head", model.lm_head)
    return model(input_ids).logits


def read_tensors(artifact):
    tensors = gguf.GGUFReader(artifact / "model.gguf").tensors
    return {tensor.name: tensor for tensor in tensors}


CASES = {
    "llama-q4": ("llama", {}, Scheme(bits=4, group_size=32)),
    "llama-q8-row": ("llama", dict(tie_word_embeddings=True), Scheme(bits=8)),
    "llama-rope3-bias": (
        "llama",
        dict(rope_parameters=LLAMA_3, attention_bias=True, head_dim=32),
        Scheme(bits=8, group_size=32),
    ),
    "mistral-q4-row": ("mistral", dict(sliding_window=128), Scheme(bits=4)),
    "qwen2-q4-64": ("qwen2", dict(intermediate_size=128), Scheme(bits=4, group_size=64)),
    "qwen3-q4": ("qwen3", dict(head_dim=32), Scheme(bits=4, group_size=32)),
    "llama-dense": ("llama", {}, None),
}


@pytest.mark.parametrize("model_type, fields, scheme", CASES.values(), ids=CASES)
def test_codes_are_stored_as_they_are_and_logits_agree(model_type, fields, scheme, tmp_path):
    parent = save_parent(tmp_path / "parent", model_type, **fields)
    result, artifact, layers = compressed(parent, tmp_path, scheme)
    found = read_tensors(artifact)
    stored = {name: value for path in result.files() for name, value in result.read(path)}
    assert len(found) == len(stored) + ("rope_parameters" in fields)

    # a tensor whose rows keep their order: codes, scales and values, bit for bit
    value, tensor = stored["model.layers.1.mlp.up_proj.weight"], found["blk.1.ffn_up.weight"]
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if scheme is None:
        assert tensor.tensor_type.name == "BF16"
        assert torch.equal(torch.from_numpy(values), value.float())
    else:
        assert tensor.tensor_type.name == {4: "Q4_0", 8: "Q8_0"}[scheme.bits]
        assert torch.equal(torch.from_numpy(values), value.dequantize())
        blocks = torch.from_numpy(np.array(tensor.data)).view(len(value.codes), 2, -1)
        scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
        assert torch.equal(scales, value.scales.repeat_interleave(2 // value.scales.shape[1], 1))
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert ("output.weight" in found) == (not fields.get("tie_word_embeddings", False))

    # all of them, through transformers, which undoes the order of rows
    input_ids = torch.randint(300, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = load(artifact)(input_ids).logits
    torch.testing.assert_close(logits, logits_of_result(parent, result, input_ids))
    matrices = [t.n_bytes for n, t in found.items() if n.startswith("blk") and t.shape.size == 2]
    assert layer_bytes(artifact, layers) == sum(matrices)


def test_the_file_says_by_itself_what_it_is(tmp_path):
    parent = save_parent(
        tmp_path / "parent", head_dim=32, rope_parameters=dict(rope_type="default", rope_theta=5e4)
    )
    _, artifact, _ = compressed(parent, tmp_path, Scheme(bits=8))
    found = load_gguf_checkpoint(artifact / "model.gguf")["config"]
    config = AutoConfig.from_pretrained(parent)
    for name in (*SIZES, "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        if name not in ("bos_token_id", "pad_token_id"):
            assert found[name] == pytest.approx(getattr(config, name)), name
    assert found["rope_theta"] == 5e4
    theirs = AutoTokenizer.from_pretrained(artifact, gguf_file="model.gguf")
    ours = AutoTokenizer.from_pretrained(parent)
    assert theirs(TEXTS[1]).input_ids == ours(TEXTS[1]).input_ids


def test_a_mistral_no_longer_than_its_window_is_a_llama(tmp_path):
    parent = save_parent(tmp_path / "parent", "mistral", sliding_window=128)
    _, artifact, _ = compressed(parent, tmp_path, Scheme(bits=8))
    fields = gguf.GGUFReader(artifact / "model.gguf").fields
    assert fields["llama.context_length"].contents() == 128
    assert AutoConfig.from_pretrained(artifact).max_position_embeddings == 128


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [0.0, 1e-9, 3e-7, 1e-4, 1.0, 1e4])
def test_nothing_is_rounded_twice_however_small_the_weights(bits, size):
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * size
    scheme = Scheme(bits=bits, group_size=64)
    value = fit_grid(weight, scheme, torch.float16).quantize(weight)
    kind = gguf.GGMLQuantizationType[{4: "Q4_0", 8: "Q8_0"}[bits]]
    found = gguf.quants.dequantize(pack_blocks(value), kind)
    assert np.array_equal(found, value.dequantize().numpy())
    error = (value.dequantize() - weight).abs().max()
    clipped = 2 ** (bits - 1) * 2.0**-25  # the smallest float16 is 2^-24
    assert error <= 0.57 * value.scales.max() + clipped


def test_scales_that_are_no_float16_are_not_rounded_silently():
    value = Quantized(
        Scheme(bits=8), torch.ones(1, 32, dtype=torch.int8), torch.tensor([[0.1]]), None
    )
    with pytest.raises(AssertionError, match="float16"):
        pack_blocks(value)


@pytest.mark.usefixtures("real_programs")
def test_the_command(corpus, tmp_path, monkeypatch):
    """All of it: data, a fresh process that loads the artifact, lineage, report."""
    parent = save_parent(tmp_path / "parent")
    words = [
        "recipe=int4_weight_only",
        "recipe.int4_weight_only.group_size=32",
        "target=gguf",
        f"model={parent}",
        f"out={tmp_path / 'out'}",
        "data=text",
        f"data.path={corpus}",
        "data.max_seq_len=32",
        "evaluation.num_samples=2",
        "evaluation.prompt_tokens=16",
    ]
    monkeypatch.setattr(sys, "argv", ["compression", *words])
    assert main() == 0
    artifact = tmp_path / "out" / "gguf"
    report = json.loads((artifact / "compression.json").read_text())
    assert report["reloaded_snr_db"] > 100
    assert report["made_from"]["scale_dtype"] == "float16" and report["speed"] == {}
    weights = sum(
        p.numel() for n, p in BlockStream(parent).model.named_parameters() if "_proj" in n
    )
    assert report["quantized_layer_bytes"] == weights * 18 / 32
    assert report["weight_bytes"] == (artifact / "model.gguf").stat().st_size
    assert "model.gguf" in json.loads((artifact / "lineage.json").read_text())["files"]


@pytest.mark.parametrize(
    "scheme, fix",
    [
        (Scheme(Number.float8), "number=int"),
        (Scheme(bits=8, activation=Activation.int8), "activation=none"),
        (Scheme(bits=3, group_size=32), "bits=4"),
        (Scheme(bits=4, group_size=32, symmetric=False), "symmetric=true"),
        (Scheme(bits=4, group_size=48), "group_size=32"),
    ],
)
def test_schemes_that_no_block_holds_are_refused(scheme, fix):
    with pytest.raises(ConfigError, match=fix):
        check({scheme}, "target")


@pytest.mark.parametrize(
    "model_type, fields, said",
    [
        ("gpt2", dict(n_embd=64, n_head=4, n_layer=1), "gpt2 .* qwen3"),
        ("llama", dict(hidden_act="gelu"), "hidden_act=gelu"),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
            "linear",
        ),
        ("qwen3", dict(attention_bias=True, head_dim=16), "attention_bias=True"),
        ("mistral", dict(sliding_window=32), "sees the last 32 of up to 128.*embeddings=32"),
        (
            "qwen2",
            dict(use_sliding_window=True, sliding_window=32, max_window_layers=1),
            "sees the last 32 of up to 128",
        ),
        (
            "qwen3",
            dict(head_dim=16, rope_parameters=LLAMA_3 | dict(attention_factor=2.0)),
            "rope_parameters.attention_factor=2.0",
        ),
        ("llama", dict(intermediate_size=172), "exclude=..\\*.down_proj"),
        ("llama", dict(vocab_size=10), "tokens, its model 10"),
    ],
)
def test_models_that_would_run_differently_are_refused(model_type, fields, said, tmp_path):
    parent = save_parent(tmp_path, model_type, **fields)
    layers = choose_layers(BlockStream(parent), ["*"], []) if model_type != "gpt2" else []
    with pytest.raises(ConfigError, match=said):
        check_parent(parent, layers, set(), "target")


def test_layers_that_are_left_out_may_have_any_width(tmp_path):
    parent = save_parent(tmp_path / "parent", intermediate_size=172)
    _, artifact, _ = compressed(parent, tmp_path, Scheme(bits=8), torch.float32, ["*.down_proj"])
    assert read_tensors(artifact)["blk.0.ffn_down.weight"].tensor_type.name == "F32"


def test_scales_for_two_targets_are_refused_where_one_would_round_them_again():
    recipe = {"round": RoundConfig()}
    parent = ParentConfig(model="x")
    config = CompressionConfig(parent=parent, target=["gguf", "torchao"], recipe=recipe)
    with pytest.raises(ConfigError, match="dtype=float32"):
        check_settings(config)
    config.dtype = Dtype.float32
    check_settings(config)
    assert config.scale_dtype == "float16"


def tokenizer_with(folder, change):
    """The trained one, with its JSON changed."""
    tokenizer = train_tokenizer(TEXTS * 20, 300)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    change(described)
    backend = Tokenizer.from_str(json.dumps(described))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(
        folder
    )
    return folder


def test_a_byte_level_vocabulary(tmp_path):
    tokenizer = train_tokenizer(TEXTS * 20, 300)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, 320, "target")
    assert (found.model, found.pre) == ("gpt2", "smollm")
    assert found.special == {"eos": 0} and found.adds == {"bos": False, "eos": False}
    assert found.tokens[0] == "<|endoftext|>" and found.types[0] == CONTROL
    assert found.tokens[319] == "[PAD319]" and found.types[319] == UNUSED
    assert found.merges[0].count(" ") == 1 and found.chat_template == "{{ messages }}"


BYTES_ONLY = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def qwen2(described):
    described["normalizer"] = {"type": "NFC"}
    described["pre_tokenizer"] = sequence(split(SPLIT_QWEN), BYTES_ONLY)


def llama_3(described):
    described["model"]["ignore_merges"] = True
    described["pre_tokenizer"] = sequence(split(SPLIT_LLAMA), BYTES_ONLY)


def gpt2(described):
    described["pre_tokenizer"] = BYTES_ONLY | {"use_regex": True}


@pytest.mark.parametrize("change, pre", [(qwen2, "qwen2"), (llama_3, "llama-bpe"), (gpt2, "gpt-2")])
def test_how_text_is_split_has_a_name(change, pre, tmp_path):
    assert read_vocabulary(tokenizer_with(tmp_path, change), 320, "target").pre == pre


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda d: d.update(pre_tokenizer=sequence(split("x"), BYTES_ONLY)),
            "llama-bpe",
        ),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "llama-bpe"),
        (lambda d: d["model"].update(ignore_merges=True), "llama-bpe"),
        (lambda d: d["added_tokens"][0].update(lstrip=True), "special token"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(change, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        read_vocabulary(tokenizer_with(tmp_path, change), 320, "target")


def save_sentencepiece(
    folder,
    merges=(
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("▁th", "e"),
        ("t", "h"),
        ("▁t", "h"),
        ("▁", "th"),
    ),
):
    """Merges by hand; spaces, bytes and <s> as Llama 2 has them."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz", *dict.fromkeys(map("".join, merges))]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab, list(merges), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return len(tokens)


def test_a_sentencepiece_vocabulary_has_scores(tmp_path):
    size = save_sentencepiece(tmp_path)
    found = read_vocabulary(tmp_path, size, "target")
    assert found.model == "llama" and not found.merges
    assert found.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert found.adds == {"bos": True, "eos": False}
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["▁t"] > score["he"] > score["▁the"] > score["th"] > score["▁th"]


@pytest.mark.parametrize(
    "merges",
    [
        [("t", "h"), ("h", "e"), ("th", "e")],  # "t" and "he" would make one, too
        [
            ("t", "h"),
            ("th", "e"),
            ("h", "e"),
            ("t", "he"),
        ],  # "the" is made both before and after "he"
    ],
)
def test_merges_that_no_scores_can_order_are_refused(merges, tmp_path):
    size = save_sentencepiece(tmp_path, merges)
    with pytest.raises(ConfigError, match="not those of a SentencePiece"):
        read_vocabulary(tmp_path, size, "target")


def test_gptq_fits_its_grid_to_float16(tmp_path):
    parent = save_parent(tmp_path / "parent")
    (tmp_path / "result").mkdir()
    result = Result(tmp_path / "result", torch.bfloat16, torch.float16)
    method = GptqConfig(group_size=32).build()
    layers = choose_layers(BlockStream(parent), ["*"], [])
    calibration = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    compress(parent, {"x": method}, layers, calibration, result, lambda done, total: None)
    for path in result.files():
        for _, value in result.read(path):
            if isinstance(value, Quantized):
                assert torch.equal(value.scales.half().float(), value.scales)
                pack_blocks(value)
