"""The OpenVINO engine. All but the first need the real one: `make test-openvino`."""

import asyncio
import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.targets.openvino_program import PYTHON, OpenVino, WeightFormat
from core.errors import ConfigError, MissingExtraError, SpotforgeError
from core.process.child import Finished
from serving.artifact import resolve
from serving.config import EngineConfig, EngineName
from serving.engine import EngineInfo, TokenRequest
from serving.engines import logits, openvino, selection
from serving.engines.proof import BOUNDS

VOCAB, CONTEXT, EOS = 300, 256, 2
FP32 = WeightFormat("fp32")
PROMPT = [5, 17, 42, 99]


def real(test):
    test = pytest.mark.openvino(test)
    return pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python")(test)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama whose tokens are not all alike, with a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model") / "tiny"
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*specials, *alphabet, *(f"w{i}" for i in range(VOCAB - 3 - len(alphabet)))]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = dict(zip(("unk_token", "bos_token", "eos_token"), specials, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ir(folder, cache):
    return openvino.prepare(folder, "digest", cache, FP32)


class Program:
    """The engine program at the other end of two pipes."""

    def __init__(self, ir, **settings):
        settings = {"kv_cache_bytes": 1 << 22, "kv_cache_precision": "f32"} | settings
        self.process = subprocess.Popen(
            openvino.command(ir, **settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def say(self, kind, content):
        self.process.stdin.write(json.dumps({kind: content}) + "\n")
        self.process.stdin.flush()

    def hear(self):
        return next(iter(json.loads(self.process.stdout.readline()).items()))

    def submit(self, name, prompt=PROMPT, max_tokens=16, **fields):
        fields = {"temperature": 0, "ignore_eos": True} | fields
        self.say("submit", dataclasses.asdict(TokenRequest(name, prompt, max_tokens, **fields)))

    def wait(self, *names):
        """Tokens, log-probabilities and finish reason or error, by request."""
        found = {name: ([], []) for name in names}
        ends = {}
        while len(ends) < len(names):
            kind, content = self.hear()
            if kind == "step":
                for name, tokens, logprobs in content["tokens"]:
                    if name in found:
                        found[name][0].extend(tokens)
                        found[name][1].extend(logprobs or [])
                ends |= {name: end for name, end in content["finished"] if name in found}
                self.step = content
            elif kind == "failed":
                ends[content["id"]] = content["error"]
            else:
                assert kind == "idle", content
        return {name: (*found[name], ends[name]) for name in names}

    def generate(self, **fields):
        self.submit("one", **fields)
        return self.wait("one")["one"]

    def close(self):
        self.process.stdin.close()
        code = self.process.wait(120)
        self.process.stdout.close()
        return code


@pytest.fixture
def program(ir):
    program = Program(ir)
    kind, program.ready = program.hear()
    assert kind == "ready"
    yield program
    if not program.process.stdin.closed:
        program.close()


def greedy(model, prompt, count):
    inputs = torch.tensor([prompt])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(inputs)
    found = model.generate(inputs, attention_mask=mask, max_new_tokens=count, **settings)
    return found[0, len(prompt) :].tolist()


def test_torch_is_not_imported():
    code = "import sys, serving.engines.openvino; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_none_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(MissingExtraError, match=f"^{PYTHON}="):
        openvino.prepare(tmp_path, "digest", tmp_path, FP32)
    with pytest.raises(MissingExtraError, match=f"^{PYTHON}="):
        openvino.command(tmp_path)


def test_a_fresh_process_computes_what_the_artifact_does(export, monkeypatch):
    """In this process, with the words that the fresh one gets."""

    def run(command, *_):
        module, *words = command[command.index("-m") + 1 :]
        assert module == logits.__name__
        logits.main(*map(Path, words))
        return Finished(0, "", "")

    monkeypatch.setattr(openvino, "run", run)
    tokens = torch.arange(1, 13).view(2, 6)
    found = openvino.torch_logits(export, tokens.numpy())
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=1e-5)


def test_an_ir_of_the_cache_that_changed_is_made_again(export, tmp_path, monkeypatch):
    exports = []

    def make(_, folder, out, weights):
        exports.append(folder)
        (out / "config.json").write_text((folder / "config.json").read_text())
        (out / "openvino_model.bin").write_bytes(b"weights")

    logits = torch.randn(2, 64, 8).numpy()
    monkeypatch.setenv(PYTHON, sys.executable)
    monkeypatch.setattr(OpenVino, "openvino_version", lambda _: "1")
    monkeypatch.setattr(OpenVino, "export", make)
    monkeypatch.setattr(OpenVino, "logits", lambda *_: logits)
    monkeypatch.setattr(openvino, "torch_logits", lambda *_: logits)
    ir = openvino.prepare(export, "digest", tmp_path, FP32)
    assert openvino.prepare(export, "digest", tmp_path, FP32) == ir and len(exports) == 1
    (ir / "openvino_model.bin").write_bytes(b"weighty")
    assert openvino.prepare(export, "digest", tmp_path, FP32) == ir and len(exports) == 2
    assert (ir / "openvino_model.bin").read_bytes() == b"weights"
    (ir / "prepared.json").write_text('{"artifact": "digest"}')  # as it was made before
    openvino.prepare(export, "digest", tmp_path, FP32)
    assert len(exports) == 3


def test_what_cannot_be_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv(PYTHON, sys.executable)
    with pytest.raises(ConfigError, match="has no config.json"):
        openvino.prepare(tmp_path, "digest", tmp_path, FP32)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    with pytest.raises(ConfigError, match="is quantized by torchao, .*; compress its parent"):
        openvino.prepare(tmp_path, "digest", tmp_path, FP32)
    (tmp_path / "openvino_model.xml").touch()
    (tmp_path / "compression.json").touch()
    with pytest.raises(ConfigError, match="is an IR without .* lineage.json"):
        openvino.prepare(tmp_path, "digest", tmp_path, FP32)
    (tmp_path / "lineage.json").touch()
    assert openvino.prepare(tmp_path, "digest", tmp_path, FP32) == tmp_path


@real
def test_it_is_prepared_once(folder, ir, cache, monkeypatch):
    monkeypatch.delattr(OpenVino, "export")
    assert openvino.prepare(folder, "digest", cache, FP32) == ir
    assert json.loads((ir / "prepared.json").read_text())["snr_db"] > 80


@real
def test_at_the_same_time_it_is_prepared_once(folder, tmp_path, monkeypatch):
    exports = []
    export = OpenVino.export

    def counted(*arguments, **settings):
        exports.append(threading.get_ident())
        return export(*arguments, **settings)

    monkeypatch.setattr(OpenVino, "export", counted)
    with ThreadPoolExecutor(2) as pool:
        weights = WeightFormat("int8")
        calls = [pool.submit(openvino.prepare, folder, "same", tmp_path, weights) for _ in range(2)]
        assert calls[0].result() == calls[1].result()
    assert len(exports) == 1
    assert 10 < json.loads((calls[0].result() / "prepared.json").read_text())["snr_db"] < 80


@real
def test_another_models_ir_is_not_kept(folder, ir, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino, "torch_logits", lambda *_: torch.randn(2, 64, VOCAB).numpy())
    with pytest.raises(SpotforgeError, match=r"logits .* -?\d+\.\d dB, below 60"):
        openvino.prepare(folder, "digest", tmp_path, FP32)
    assert [path.suffix for path in tmp_path.iterdir()] in ([".lock"], [])


@real
def test_what_it_says_of_itself(program):
    info = EngineInfo(**program.ready)
    assert info.engine.startswith("OpenVINO GenAI 20")
    assert (info.max_context, info.max_logprobs) == (CONTEXT, 0)
    assert sorted(info.features) == ["min_p", "repetition_penalty", "top_k"]


@real
def test_it_serves_once_it_is_proven_and_is_not_started_again(folder, cache, ir):
    async def generate():
        config = EngineConfig(name=EngineName.openvino, openvino_bits=32, num_threads=1)
        started = await selection.start(resolve(str(folder)), config, cache, {})
        try:
            request = TokenRequest("one", PROMPT, 8, temperature=0, ignore_eos=True)
            tokens = [t async for chunk in started.engine.submit(request) for t in chunk.tokens]
            await asyncio.sleep(1)  # what it was told last has reached it
            return tokens, started.engine.stats().restarts, started.engine.is_ready
        finally:
            await started.engine.close()

    tokens, restarts, is_ready = asyncio.run(generate())
    assert len(tokens) == 8 and restarts == 0 and is_ready
    [proof] = (cache / "proofs").iterdir()
    assert json.loads(proof.read_text())["worst_nats"] < BOUNDS["float16"]


@real
def test_eight_at_once_are_greedy_as_transformers_is(program, model):
    prompts = [[3 + i, *PROMPT, 200 + i] * (1 + 3 * i) for i in range(8)]
    for i, prompt in enumerate(prompts):
        program.submit(str(i), prompt, max_tokens=24)
    found = program.wait(*map(str, range(8)))
    for i, prompt in enumerate(prompts):
        assert found[str(i)] == (greedy(model, prompt, 24), [], "length")


@real
def test_a_seed_repeats_in_any_company(program):
    sampling = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 48}
    alone = program.generate(seed=7, **sampling)[0]
    for i in range(7):
        program.submit(str(i), PROMPT[i % 3 :] * (1 + i), seed=i, **sampling)
    program.submit("again", seed=7, **sampling)
    program.submit("other", seed=8, **sampling)
    found = program.wait("again", "other")
    assert found["again"][0] == alone != found["other"][0]
    assert program.generate(seed=7, offset=1, **sampling)[0] != alone


@real
def test_it_samples_the_models_distribution(program, model):
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    count = 600
    for i in range(count):
        program.submit(str(i), max_tokens=1, temperature=1.0, seed=i)
    found = program.wait(*map(str, range(count)))
    token = int(wanted.argmax())
    share, p = sum(tokens == [token] for tokens, *_ in found.values()) / count, wanted[token].item()
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count)
    program.submit("nucleus", max_tokens=1, temperature=1.0, top_p=1e-6)
    program.submit("cold", max_tokens=1, temperature=1e-30)
    found = program.wait("nucleus", "cold")
    assert found["nucleus"][0] == found["cold"][0] == [token]


@real
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_models_own(program, model, temperature):
    tokens, told, _ = program.generate(temperature=temperature, logprobs=0, seed=3)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    assert [top for _, top in told] == [[]] * len(tokens)
    torch.testing.assert_close(torch.tensor([own for own, _ in told]), wanted, atol=1e-3, rtol=1e-3)


@real
def test_it_ends_at_eos_which_is_not_told(ir, model, tmp_path):
    wanted = greedy(model, PROMPT, 16)
    ends = next(i for i in range(3, 16) if wanted[i] not in wanted[:i])
    for path in ir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((ir / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    config["eos_token_id"] = [299, wanted[ends]]
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    program = Program(tmp_path)
    assert program.hear()[0] == "ready"
    tokens, logprobs, reason = program.generate(ignore_eos=False, logprobs=0)
    assert (tokens, len(logprobs), reason) == (wanted[:ends], ends, "stop")
    assert program.generate(ignore_eos=True)[::2] == (wanted, "length")
    assert program.generate(ignore_eos=False, max_tokens=2)[::2] == (wanted[:2], "length")
    program.close()


@real
def test_what_it_cannot_do_is_that_requests_failure(program):
    refused = {
        "long": {"max_tokens": CONTEXT},
        "foreign": {"prompt": [VOCAB]},
        "top": {"logprobs": 2},
        "tempered": {"logprobs": 0, "temperature": 0.5},
        "nucleus": {"logprobs": 0, "temperature": 1.0, "top_p": 0.5},
        "schema": {"schema": {"type": "nonsense"}},
    }
    for name, fields in refused.items():
        program.submit(name, **fields)
    program.submit("fine")
    found = program.wait(*refused, "fine")
    assert found.pop("fine")[2] == "length"
    assert all(not tokens and " " in error for tokens, _, error in found.values())
    assert "256" in found["long"][2]


@real
def test_a_cancelled_request_makes_room(ir):
    program = Program(ir, max_running=1)
    assert program.hear()[0] == "ready"
    program.submit("first", max_tokens=CONTEXT - len(PROMPT))
    program.submit("second", max_tokens=2)
    assert program.hear()[1]["tokens"][0][0] == "first"
    for _ in range(3):
        assert {name for name, *_ in program.hear()[1]["tokens"]} == {"first"}
    program.say("cancel", "first")
    program.say("cancel", "unknown")
    assert program.wait("second")["second"][2] == "length"
    assert program.step["running"] == 0
    program.close()


@real
def test_more_than_the_cache_holds_wait_for_one_another(ir, model):
    program = Program(ir, kv_cache_bytes=300 * 2 * 2 * 2 * 16 * 4)
    assert program.hear()[0] == "ready"
    for i in range(8):
        program.submit(str(i), max_tokens=100)
    found = program.wait(*map(str, range(8)))
    assert {tuple(tokens) for tokens, *_ in found.values()} == {tuple(greedy(model, PROMPT, 100))}
    program.close()


@real
def test_nothing_is_forked_that_would_keep_its_pipes(program):
    program.generate()
    program.process.kill()
    for line in program.process.stdout:  # ends only when nobody else holds it
        assert json.loads(line)


@real
def test_it_ends_with_the_gateway(program):
    program.submit("endless", max_tokens=CONTEXT - len(PROMPT))
    program.hear()
    assert program.close() == 0


@real
def test_a_fatal_error_is_one_line(tmp_path):
    program = Program(tmp_path)
    kind, error = program.hear()
    assert kind == "fatal" and "config.json" in error
    assert program.process.wait(120) == 2
    program.close()
