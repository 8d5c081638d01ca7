"""The OpenVINO target. What needs OpenVINO is marked so: `make test-openvino`.

SPOTFORGE_OPENVINO_PYTHON names its Python, SPOTFORGE_STORIES260K the folder of a real model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compression.targets.openvino_program import (
    PYTHON,
    IntegerWeight,
    OpenVino,
    Speed,
    WeightFormat,
)
from core.errors import ConfigError, MissingExtraError, SpotforgeError

needs_openvino = [
    pytest.mark.openvino,
    pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python"),
]
TEXT = "Once upon a time, there was a little girl named Lily. She had 12 red balls."


def real(test):
    for mark in needs_openvino:
        test = mark(test)
    return test


def one_line(error):
    return "\n" not in str(error.value)


def snr_db(found, wanted):
    """Power of `wanted` over that of the difference, in dB."""
    wanted = wanted.astype(np.float64)
    return 10 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum())


# ---- without OpenVINO: a stand-in for its Python ------------------------------------------------


@pytest.fixture
def stand_in(tmp_path):
    """Makes an `OpenVino` whose Python runs a few lines, with `verb` and `arguments` at hand."""

    def make(lines):
        path = tmp_path / "python"
        begin = "import json, os, signal, sys, time\nfrom pathlib import Path\n"
        begin += "verb, arguments = sys.argv[3], json.loads(sys.argv[4])\n"
        path.write_text(f"#!{sys.executable} -S\n{begin}{lines}\n")
        path.chmod(0o755)
        return OpenVino(str(path))

    return make


@pytest.fixture
def source(tmp_path):
    """What looks like a Hugging Face folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def exported(tmp_path):
    """What looks like an export."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 10, "max_position_embeddings": 16}')
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (folder / name).write_text("")
    return folder


def test_none_is_named(monkeypatch):
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(MissingExtraError, match=f"^{PYTHON}=None: .*; build one with") as error:
        OpenVino()
    assert one_line(error)


def test_no_such_program(tmp_path):
    with pytest.raises(
        ConfigError, match="^mine.python=.*there is no such program; build"
    ) as error:
        OpenVino(str(tmp_path / "python"), key="mine.python")
    assert one_line(error)


def test_this_python_has_no_openvino():
    with pytest.raises(MissingExtraError, match=f"^{PYTHON}=.*lacks ModuleNotFoundError") as error:
        OpenVino(sys.executable).versions()
    assert one_line(error)


def test_a_program_that_is_no_python():
    with pytest.raises(ConfigError, match="does not run the worker"):
        OpenVino("true").versions()


def test_a_program_that_does_not_start(tmp_path):
    path = tmp_path / "python"
    path.write_text("no program")
    path.chmod(0o755)
    with pytest.raises(ConfigError, match=f"^{PYTHON}=.*: Exec format error; build"):
        OpenVino(str(path)).versions()


def test_the_environment_variable_names_it(stand_in, monkeypatch):
    stand_in('print(json.dumps({"openvino": "1"}))')
    monkeypatch.setenv(PYTHON, stand_in('print(json.dumps({"openvino": "2"}))')._python)
    assert OpenVino().versions() == {"openvino": "2"}


def test_the_worker_is_kept_from_the_network_and_from_our_folder(stand_in):
    openvino = stand_in('print(json.dumps([sys.argv[1], os.environ["HF_HUB_OFFLINE"]]))')
    with pytest.raises(ConfigError, match="does not run the worker"):  # an answer is an object
        openvino.versions()
    openvino = stand_in('print(json.dumps({k: os.environ[k] for k in ("HF_HUB_OFFLINE", "CI")}))')
    assert openvino.versions() == {"HF_HUB_OFFLINE": "1", "CI": "true"}
    assert stand_in('print(json.dumps({"word": sys.argv[1]}))').versions() == {"word": "-I"}


EXPORT = """
out = Path(arguments["out"])
(out / "openvino_model.xml").write_text("half")
"""


def test_an_export_comes_at_once(stand_in, source, tmp_path):
    done = 'print(json.dumps({"num_parameters": {"u8": 3}, "peak_rss_bytes": 5}))'
    out = tmp_path / "new" / "out"
    stale = out.with_name(".staging-out")
    stale.mkdir(parents=True)
    (stale / "old").touch()
    result = stand_in(EXPORT + done).export(source, out)
    assert [path.name for path in out.iterdir()] == ["openvino_model.xml"]
    assert (result.folder, result.num_parameters, result.size_bytes) == (out, {"u8": 3}, 4)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("lines", "kind", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", SpotforgeError, "SIGKILL: most likely"),
        (
            'print("boom", file=sys.stderr)\nos.kill(os.getpid(), signal.SIGFPE)',
            SpotforgeError,
            "SIGFPE: boom",
        ),
        ('sys.exit("SyntaxError: of an old one")', ConfigError, "SyntaxError: of an old one"),
        (
            'print(json.dumps({"error": {"failed": "ValueError: x"}})); sys.exit(1)',
            SpotforgeError,
            "^OpenVINO's export failed: ValueError: x$",
        ),
        (
            'print(json.dumps({"error": dict(key="k", value=1, rule="r", fix="f")})); sys.exit(2)',
            ConfigError,
            "^k=1: r; f$",
        ),
    ],
    ids=["killed", "crashed", "old", "failed", "refused"],
)
def test_nothing_half_written_stays(stand_in, source, tmp_path, lines, kind, says):
    out = tmp_path / "new" / "out"
    with pytest.raises(kind, match=says) as error:
        stand_in(EXPORT + lines).export(source, out, timeout_s=300)
    assert one_line(error) and type(error.value) is kind
    assert list(out.parent.iterdir()) == []


def test_one_that_takes_too_long_leaves_nothing(stand_in, source, tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(SpotforgeError, match="stopped after 1 s; raise timeout_s") as error:
        stand_in(EXPORT + "time.sleep(1000)").export(source, out, timeout_s=1)
    assert one_line(error)
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_is_taken(stand_in, source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="^out=.*is there already"):
        stand_in("").export(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.json", None, "there is no config.json"),
        ("config.json", "{", "config.json"),
        ("config.json", '{"quantization_config": {}}', "quantized already"),
        ("model.safetensors", None, "there are no"),
        ("tokenizer_config.json", None, "there is no tokenizer_config.json"),
    ],
)
def test_a_source_that_is_unfit(stand_in, source, tmp_path, name, text, says):
    (source / name).unlink()
    if text is not None:
        (source / name).write_text(text)
    with pytest.raises(ConfigError, match=f"^source=.*{says}") as error:
        stand_in("").export(source, tmp_path / "out")
    assert one_line(error)


@pytest.mark.parametrize("name", ["config.json", "openvino_model.xml", "openvino_model.bin"])
def test_an_export_that_is_not_whole(stand_in, exported, name):
    (exported / name).unlink()
    for ask in (
        lambda worker: worker.logits(exported, np.zeros((1, 2), np.int64)),
        lambda worker: worker.speed(exported),
    ):
        with pytest.raises(ConfigError, match=f"^folder=.*there is no {name}; export"):
            ask(stand_in(""))


@pytest.mark.parametrize(
    ("token_ids", "says"),
    [([[0, 10]], "0 to 10"), ([[-1, 2]], "-1 to 2"), ([1, 2], r"\(2,\)"), ([[]], r"\(1, 0\)")],
)
def test_tokens_that_it_has_not(stand_in, exported, token_ids, says):
    with pytest.raises(ConfigError, match=f"^token_ids=.*{says}"):
        stand_in("").logits(exported, np.array(token_ids, np.int64))


def test_speed_refuses_what_cannot_be_timed(stand_in, exported):
    for key in ("num_prompt_tokens", "num_new_tokens", "repeats"):
        with pytest.raises(ConfigError, match=f"^{key}=0: "):
            stand_in("").speed(exported, **{key: 0})
    with pytest.raises(ConfigError, match="^num_new_tokens=9: .* 16 positions"):
        stand_in("").speed(exported, 8, 9)
    answer = {"prefill_tokens_per_s": 4.0, "decode_tokens_per_s": 3.0, "cpu_ms_per_token": 2.0}
    lines = f"print(json.dumps({answer} | {{'peak_rss_bytes': arguments['vocab_size']}}))"
    assert stand_in(lines).speed(exported, 8, 8) == Speed(4.0, 3.0, 2.0, 10)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "int3"},
        {"dtype": "int8", "group_size": 32},
        {"dtype": "fp32", "ratio": 0.5},
        {"dtype": "int8", "all_layers": True},
        {"dtype": "fp16", "is_symmetric": True},
        {"dtype": "int4", "ratio": 1.5},
        {"dtype": "int4", "group_size": 0},
    ],
)
def test_settings_without_effect_are_refused(settings):
    with pytest.raises(ConfigError):
        WeightFormat(**settings)


def a_weight(**changed):
    values = {
        "bits": 4,
        "codes": np.zeros((6, 8), np.int8),
        "scales": np.ones((6, 2), np.float32),
        "zero_points": np.zeros((6, 2), np.int8),
    }
    return IntegerWeight(**(values | changed))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 3),
        ("codes", np.zeros(8, np.int8)),
        ("codes", np.zeros((6, 8), np.int32)),
        ("codes", np.full((6, 8), 8, np.int8)),
        ("codes", np.full((6, 8), -9, np.int8)),
        ("scales", np.ones((6, 2))),
        ("scales", np.ones((6, 3), np.float32)),
        ("scales", np.ones((5, 2), np.float32)),
        ("zero_points", np.zeros((6, 1), np.int8)),
        ("zero_points", np.full((6, 2), 8, np.int8)),
    ],
)
def test_codes_that_do_not_fit(key, value):
    assert a_weight().bits == 4
    with pytest.raises(ConfigError, match=f"^{key}="):
        a_weight(**{key: value})


# ---- with the real OpenVINO ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def openvino():
    return OpenVino()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama of 2 layers that knows TEXT by heart, and a tokenizer as the trainer makes them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model, tokenizer = LlamaForCausalLM(config), train_tokenizer([TEXT] * 9, 300)
    token_ids = tokenizer(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stories():
    if "SPOTFORGE_STORIES260K" not in os.environ:
        pytest.skip("SPOTFORGE_STORIES260K names no folder")
    return Path(os.environ["SPOTFORGE_STORIES260K"])


@pytest.fixture(scope="module")
def int8(openvino, tiny):
    return openvino.export(tiny, tiny.with_name("int8"))


def dense_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits_of(model, token_ids):
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(token_ids)).logits.numpy()


def tokens_of(folder, shape=(3, 48)):
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(vocab_size, size=shape)


GENERATE = """
import json, sys
import openvino_genai
pipeline = openvino_genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_PRECISION_HINT="f32")
ids = pipeline.get_tokenizer().encode(sys.argv[2]).input_ids.data.tolist()
text = pipeline.generate(sys.argv[2], max_new_tokens=14, do_sample=False, ignore_eos=True)
print(json.dumps([ids, text]))
"""


def generate(folder, prompt):
    """Token ids of the prompt, and the greedy text behind it, by OpenVINO GenAI."""
    words = [os.environ[PYTHON], "-I", "-c", GENERATE, str(folder), prompt]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_same_text(source, folder):
    """OpenVINO's own pipeline has the tokens and the greedy text of the dense model."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = TEXT[:33]
    given = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        new = dense_of(source).generate(**given, max_new_tokens=14, do_sample=False)
    text = tokenizer.decode(new[0, given.input_ids.shape[1] :], skip_special_tokens=True)
    ids, found = generate(folder, prompt)
    assert ids == given.input_ids.tolist()
    assert len(text) > 14 and found.strip() == text.strip()


@real
def test_versions(openvino):
    assert openvino.versions()["openvino"].startswith("2026.4")


@real
def test_int8(openvino, tiny, int8):
    token_ids = tokens_of(tiny)
    dense = logits_of(dense_of(tiny), token_ids)
    weights_only = openvino.logits(int8.folder, token_ids, 1, dynamic_quantization=False)
    assert weights_only.dtype == np.float32 and weights_only.shape == dense.shape
    assert snr_db(weights_only, dense) > 30
    assert snr_db(openvino.logits(int8.folder, token_ids, 1), dense) > 25
    assert set(int8.num_parameters) == {"u8", "f32"}
    assert int8.num_parameters["u8"] > 50 * int8.num_parameters["f32"]
    assert list(tiny.parent.glob(".*")) == []
    assert_same_text(tiny, int8.folder)


@real
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_floats(openvino, tiny, tmp_path, dtype):
    done = openvino.export(tiny, tmp_path / dtype, WeightFormat(dtype))
    token_ids = tokens_of(tiny)
    dense = logits_of(dense_of(tiny), token_ids)
    least = {"fp32": 100, "fp16": 45}[dtype]
    assert snr_db(openvino.logits(done.folder, token_ids), dense) > least
    assert max(done.num_parameters, key=done.num_parameters.get) == f"f{dtype[2:]}"


@real
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_int4(openvino, tiny, tmp_path, is_symmetric):
    weights = WeightFormat("int4", group_size=32, is_symmetric=is_symmetric)
    done = openvino.export(tiny, tmp_path / "int4", weights)
    token_ids = tokens_of(tiny)
    dense = logits_of(dense_of(tiny), token_ids)
    assert snr_db(openvino.logits(done.folder, token_ids), dense) > 11
    model = dense_of(tiny)
    inner = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "proj" in n)
    assert done.num_parameters["i4" if is_symmetric else "u4"] == inner
    assert done.num_parameters["u8"] == model.lm_head.weight.numel()


@real
def test_int4_everywhere_and_in_part(openvino, tiny, tmp_path):
    everywhere = WeightFormat("int4", group_size=32, all_layers=True)
    done = openvino.export(tiny, tmp_path / "everywhere", everywhere)
    assert set(done.num_parameters) == {"u4", "f32"}
    half = WeightFormat("int4", group_size=32, ratio=0.5)
    found = openvino.export(tiny, tmp_path / "half", half).num_parameters
    assert 0 < found["u4"] < done.num_parameters["u4"] * 0.6


def rounded(weight, bits, group_size, with_zero_points):
    """A weight to nearest, in groups: an `IntegerWeight`, and what it stands for."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, group_size)
    half = 1 << (bits - 1)
    if with_zero_points:
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        scales = ((high - low) / (2 * half - 1)).astype(np.float32)
        zeros = np.clip(np.rint(-low / scales) - half, -half, half - 1)
    else:
        scales = (np.abs(groups).max(-1, keepdims=True) / (half - 1)).astype(np.float32)
        zeros = np.zeros_like(scales)
    codes = np.clip(np.rint(groups / scales) + zeros, -half, half - 1)
    made = IntegerWeight(
        bits,
        codes.reshape(rows, columns).astype(np.int8),
        scales[..., 0],
        zeros[..., 0].astype(np.int8) if with_zero_points else None,
    )
    return made, ((codes - zeros) * scales).reshape(rows, columns).astype(np.float32)


@real
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_zero_points", [False, True])
def test_codes_of_ours_arrive_exactly(openvino, tiny, tmp_path, bits, with_zero_points):
    """Also where nncf rounds the others, here none, and in the embedding."""
    import torch

    model, codes = dense_of(tiny), {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            weight = parameter.detach().numpy()
            group_size = 32 if "proj" in name else weight.shape[1]
            codes[name], stands_for = rounded(weight, bits, group_size, with_zero_points)
            parameter.data = torch.from_numpy(stands_for)
    done = openvino.export(tiny, tmp_path / "codes", WeightFormat("int8"), codes)
    token_ids = tokens_of(tiny)
    found = openvino.logits(done.folder, token_ids, dynamic_quantization=False)
    assert snr_db(found, logits_of(model, token_ids)) > 100
    stored = f"{'u' if with_zero_points else 'i'}{bits}"
    assert set(done.num_parameters) == {stored, "f32"}


@real
def test_codes_beside_weights_that_nncf_rounds(openvino, tiny, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dense_of(tiny).get_parameter(name).detach().numpy()
    codes = {name: rounded(weight, 4, 32, True)[0]}
    done = openvino.export(tiny, tmp_path / "codes", WeightFormat("int8"), codes)
    assert done.num_parameters["u4"] == weight.size
    assert set(done.num_parameters) == {"u4", "u8", "f32"}
    with pytest.raises(ConfigError, match="^codes=model.layers.9.*"):
        other = {"model.layers.9.mlp.up_proj.weight": codes[name]}
        openvino.export(tiny, tmp_path / "other", None, other)


@real
def test_speed(openvino, int8):
    timed = openvino.speed(int8.folder, 32, 16, repeats=3, num_threads=1)
    assert timed.prefill_tokens_per_s > timed.decode_tokens_per_s > 0
    # On one thread a token takes no more CPU than time.
    assert 0 < timed.cpu_ms_per_token < 1.5 * 1000 / timed.decode_tokens_per_s
    assert 30e6 < timed.peak_rss_bytes < 2e9


@real
def test_a_group_that_does_not_divide(openvino, tiny, tmp_path):
    with pytest.raises(ConfigError, match="^group_size=48: does not divide .*64") as error:
        openvino.export(tiny, tmp_path / "odd", WeightFormat("int4", group_size=48))
    assert one_line(error) and list(tmp_path.iterdir()) == []


@real
def test_an_architecture_that_it_does_not_know(openvino, tiny, tmp_path):
    folder = tmp_path / "strange"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for kind in ("spotforge", "bert"):
        config = json.loads((tiny / "config.json").read_text()) | {"model_type": kind}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=f"^model_type={kind}: optimum-intel .*; choose"):
            openvino.export(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


@real
def test_a_damaged_export(openvino, tiny, int8, tmp_path):
    for name in ("openvino_model.xml", "openvino_model.bin"):
        folder = tmp_path / name
        folder.mkdir()
        for path in int8.folder.iterdir():
            data = path.read_bytes()
            (folder / path.name).write_bytes(data[: len(data) // 2] if path.name == name else data)
        with pytest.raises(SpotforgeError, match="^OpenVINO's logits ") as error:
            openvino.logits(folder, tokens_of(tiny))
        assert one_line(error)


@real
def test_an_export_that_is_killed_as_it_writes(openvino, tiny, tmp_path):
    wait = f"until ls {tmp_path}/.staging-out/ir/openvino_model.xml; do sleep 0.1; done"
    lines = [f"({wait}; kill -9 $$) > /dev/null 2>&1 &", f'exec "{openvino._python}" "$@"']
    path = tmp_path / "python"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    says = "^OpenVINO's export died of SIGKILL: .* memory$"
    with pytest.raises(SpotforgeError, match=says):
        OpenVino(str(path)).export(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


@real
def test_a_real_model(openvino, stories, tmp_path):
    token_ids = tokens_of(stories)
    dense = logits_of(dense_of(stories), token_ids)
    int8 = openvino.export(stories, tmp_path / "int8")
    assert snr_db(openvino.logits(int8.folder, token_ids), dense) > 30
    assert_same_text(stories, int8.folder)
    int4 = openvino.export(stories, tmp_path / "int4", WeightFormat("int4", group_size=4))
    assert snr_db(openvino.logits(int4.folder, token_ids), dense) > 20
    with pytest.raises(ConfigError, match=r"^group_size=64: .*down_proj.*172"):
        openvino.export(stories, tmp_path / "odd", WeightFormat("int4"))
