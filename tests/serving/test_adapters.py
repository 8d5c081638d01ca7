"""LoRA adapters by name: exact in a mixed batch, traceable, and refused where they do not fit."""

import asyncio
import json
import math
import re
import shutil
import sys

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from core.errors import ConfigError
from core.settings.rules import check_settings
from serving.adapters import identity, resolve, resolve_all
from serving.artifact import resolve as resolve_artifact
from serving.config import EngineConfig, EngineName, ServingConfig
from serving.engine import TokenRequest
from serving.engines.lora import LoraLayers
from serving.engines.process import ProcessEngine
from serving.engines.selection import build
from serving.server import serve
from tests.serving.conftest import Process, caught_at, save_model

PROMPT = list(range(70, 150))  # longer than a step
LAYERS = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.1.self_attn.v_proj": (64, 32),
    "model.layers.1.mlp.down_proj": (96, 64),
    "lm_head": (64, 320),
}


def save_adapter(folder, layers=LAYERS, seed=0, ranks=None, size=0.3, **config):
    """As PEFT's save_pretrained writes it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (wide, out) in layers.items():
        rank = (ranks or {}).get(layer, 4)
        for side, shape in (("A", (rank, wide)), ("B", (out, rank))):
            matrix = torch.randn(shape, generator=generator) * size
            tensors[f"base_model.model.{layer}.lora_{side}.weight"] = matrix
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "use_dora": False,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def merge(model, folder, scale):
    """Into the weights, by the formula alone; `scale` tells a layer's."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if ".lora_A." in name]:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = scale(layer) * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        module = model.get_submodule(layer)
        with torch.no_grad():
            module.weight += update.T if type(module).__name__ == "Conv1D" else update
    return model


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two: one as simple as it gets, one with all that changes ranks and scales."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(folder / "plain")
    save_adapter(
        folder / "patterns",
        {**LAYERS, "model.layers.0.mlp.up_proj": (64, 96)},
        seed=1,
        ranks={"lm_head": 2, "model.layers.1.mlp.down_proj": 8},
        use_rslora=True,
        rank_pattern={"lm_head": 2, r"layers\.1\.mlp\.down_proj": 8},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 6, r"\w+_proj": 3},
    )
    return {"plain": folder / "plain", "patterns": folder / "patterns"}


def scale_of_patterns(layer):
    alpha = 6 if "q_proj" in layer else 3 if layer.endswith("_proj") else 8
    return alpha / math.sqrt({"lm_head": 2, "model.layers.1.mlp.down_proj": 8}.get(layer, 4))


@pytest.fixture(scope="module")
def merged(export, adapters):
    def base():
        return AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()

    return {
        None: base(),
        "plain": merge(base(), adapters["plain"], lambda _: 8 / 4),
        "patterns": merge(base(), adapters["patterns"], scale_of_patterns),
    }


def engine(folder, adapters):
    resolved = {name: resolve(name, str(path)) for name, path in adapters.items()}
    settings = dict(
        folder=str(folder),
        target=None,
        max_context=256,
        max_running=8,
        max_batch_tokens=64,
        kv_cache_tokens=2048,
        num_threads=1,
        adapters={a.name: (str(a.folder), a.digest) for a in resolved.values()},
    )
    command = [sys.executable, "-m", "serving.engines.transformers_worker", json.dumps(settings)]
    return ProcessEngine(command)


async def ask(running, name, prompt, adapter, max_tokens=12, **settings):
    settings = {"temperature": 0, "ignore_eos": True, **settings}
    request = TokenRequest(name, prompt, max_tokens, adapter=adapter, **settings)
    tokens, logprobs = [], []
    async for chunk in running.submit(request):
        tokens += chunk.tokens
        logprobs += [token.logprob for token in chunk.logprobs or ()]
    return tokens, logprobs


def with_engine(running, work):
    async def run():
        await running.start()
        try:
            return await work(running)
        finally:
            await running.close()

    return asyncio.run(run())


def check_answer(model, prompt, tokens, logprobs):
    """Greedy by the model, with its log-probabilities."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    assert tokens == logits.argmax(-1).tolist()
    wanted = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert logprobs == pytest.approx(wanted.tolist(), abs=2e-3)


def test_a_mixed_batch_is_exact_and_outlives_its_engine(export, adapters, merged):
    """The same prompts for all: a shared prefix, or a row of another request, would show.

    Prompts are longer than a step, so that some steps have the start of one request, and tokens
    of others; the odd lengths leave steps with a single token of a prompt.
    """
    asked = [
        (prompt, name)
        for prompt in (PROMPT, PROMPT[:63], [5])
        for name in (None, "plain", "patterns")
    ]

    async def work(running):
        async def all_of(prefix):
            every = [
                ask(running, f"{prefix}{i}", prompt, name, logprobs=0)
                for i, (prompt, name) in enumerate(asked)
            ]
            return await asyncio.gather(*every)

        first = await all_of("a")
        again = await all_of("b")  # their blocks would still be there
        vectors = [await running.embed(f"v{name}", [PROMPT], name) for name in merged]
        last = await caught_at(running, all_of, num_tokens=1)
        return first, again, vectors, await last, running.stats().restarts

    first, again, vectors, last, restarts = with_engine(engine(export, adapters), work)
    assert restarts == 1
    for (prompt, name), *answers in zip(asked, first, again, last, strict=True):
        for tokens, logprobs in answers:
            check_answer(merged[name], prompt, tokens, logprobs)
    assert len({tuple(tokens) for tokens, _ in first[:3]}) == 3
    for model, [vector] in zip(merged.values(), vectors, strict=True):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([PROMPT])).last_hidden_state[0].mean(0)
        assert torch.allclose(torch.tensor(vector), hidden / hidden.norm(), atol=1e-4)


def test_layers_of_conv1d_and_of_steps_with_a_token_of_a_prompt(tmp_path):
    """GPT-2 keeps its weights transposed; a step's logits may be in another order than its rows."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    model, plain = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval()
    plain.load_state_dict(model.state_dict())
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone())  # no longer tied
    layers = {"transformer.h.0.attn.c_attn": (32, 96), "lm_head": (32, 50)}
    folder = save_adapter(tmp_path / "a", layers, fan_in_fan_out=True)
    wanted = merge(plain, folder, lambda _: 2)
    lora = LoraLayers(model, [resolve("a", str(folder))])
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        base = model(ids).logits
        lora.use("a")
        assert torch.allclose(model(ids).logits, wanted(ids).logits, atol=1e-4)
        lora.use(None)
        assert torch.equal(model(ids).logits, base)
        # Three requests of a token each, the second without a new token: its row is a filler.
        lora.follow(model, lambda: [(1, None), (1, None), (1, "a")])
        kept = torch.tensor([0, 2, 0])
        hidden = model.transformer(ids[:, :3]).last_hidden_state
        found = model(input_ids=ids[:, :3], logits_to_keep=kept).logits[0]
        lora.use(None)
        update = model.lm_head(hidden)[0, :1]
        assert torch.allclose(found[0], update[0], atol=1e-4)
        assert not torch.allclose(found[1], model.lm_head(hidden)[0, 2], atol=1e-3)
        with pytest.raises(RuntimeError, match="5 tokens, its requests 3"):
            model(input_ids=ids)


def test_a_quantized_base_is_adapted(export, adapters):
    base = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    quantize_(base, Int8WeightOnlyConfig())
    dense = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter:
            dense.get_submodule(name).weight = torch.nn.Parameter(module.weight.dequantize())
    lora = LoraLayers(base, [resolve("plain", str(adapters["plain"]))])
    lora.use("plain")
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        before = dense(ids).logits
        wanted = merge(dense, adapters["plain"], lambda _: 2)(ids).logits
        found = base(ids).logits
    assert torch.allclose(found, wanted, atol=1e-2)
    assert (wanted - before).abs().max() > 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora=true"),
        ({"bias": "lora_only"}, 'bias="lora_only"'),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save=["lm_head"]'),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1]"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=[1]"),
        ({"task_type": "SEQ_CLS"}, 'task_type="SEQ_CLS"'),
        ({"peft_type": "IA3"}, "not a LoRA adapter"),
        ({"r": 8}, "says rank 8"),
        ({"lora_alpha": None}, "alpha None"),
        ({"rank_pattern": {"q_proj": 0}}, "rank 0"),
    ],
)
def test_settings_that_would_change_the_answer_are_refused(tmp_path, config, said):
    folder = save_adapter(tmp_path / "a", **config)
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        resolve("a", str(folder))
    assert refused.value.key == "adapters.a" and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.lora_magnitude_vector.weight",
        "base_model.model.lm_head.lora_B.bias",
        "base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight",
        "lm_head.lora_A.weight",
    ],
)
def test_tensors_that_are_no_matrices_of_linear_layers_are_refused(tmp_path, name):
    path = save_adapter(tmp_path / "a") / "adapter_model.safetensors"
    save_file({**load_file(path), name: torch.zeros(4, 4)}, path)
    with pytest.raises(ConfigError, match=re.escape(name)):
        resolve("a", str(path.parent))


def test_damaged_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=re.escape("has no adapter_config.json")):
        resolve("a", str(tmp_path))
    folder = save_adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="is damaged"):
        resolve("a", str(folder))


@pytest.mark.parametrize(
    ("layers", "value", "said"),
    [
        ({"model.layers.7.self_attn.q_proj": (64, 64)}, 1.0, "has no layer model.layers.7"),
        ({"lm_head": (64, 300)}, 1.0, "lm_head is 64 -> 300, the base's 64 -> 320"),
        ({"model.norm": (64, 64)}, 1.0, "model.norm of the base is not a linear layer"),
        ({"lm_head": (64, 320)}, math.nan, "matrices of lm_head are not finite"),
    ],
)
def test_an_adapter_of_another_base_is_refused(merged, tmp_path, layers, value, said):
    folder = save_adapter(tmp_path / "a", layers, size=value)
    with pytest.raises(ConfigError, match=re.escape(said)):
        LoraLayers(merged[None], [resolve("a", str(folder))])


def test_an_engine_refuses_an_adapter_that_misfits(export, tmp_path):
    misfit = save_adapter(tmp_path / "misfit", {"lm_head": (32, 320)})
    with pytest.raises(ConfigError, match="lm_head is 32 -> 320, the base's 64 -> 320") as refused:
        asyncio.run(engine(export, {"misfit": misfit}).start())
    assert refused.value.key == "adapters.misfit"


def test_an_adapter_with_the_name_of_its_base_is_refused(export, adapters):
    config = ServingConfig(artifact=str(export), adapters={"tiny": str(adapters["plain"])})
    with pytest.raises(ConfigError) as refused:
        asyncio.run(serve(config))
    assert refused.value.key == "adapters.tiny"


def test_an_answer_names_base_and_adapter(export, adapters, monkeypatch, tmp_path):
    warnings = []
    monkeypatch.setattr("serving.adapters._log.warning", lambda *said: warnings.append(said))
    artifact = resolve_artifact(str(export))
    found = resolve_all({"plain": str(adapters["plain"])}, artifact)["plain"]
    version, digest = identity(artifact, found)
    assert digest == f"{artifact.digest}+{found.digest}"
    assert version == f"{artifact.version}+{found.digest[:12]}"
    assert not warnings
    other = save_adapter(tmp_path / "other", base_model_name_or_path="org/Larger")
    assert resolve_all({"o": str(other)}, artifact)["o"].digest != found.digest
    assert len(warnings) == 1 and "org/Larger" in warnings[0]


def test_openvino_is_not_taken_for_adapters(export, adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("SPOTFORGE_OPENVINO_PYTHON", sys.executable)
    artifact = resolve_artifact(str(export))
    found = resolve_all({"plain": str(adapters["plain"])}, artifact)
    _, name, why, *_ = asyncio.run(build(artifact, EngineConfig(), tmp_path, found))
    assert name is EngineName.transformers and "adapters" in why
    asked = EngineConfig(name=EngineName.openvino)
    with pytest.raises(ConfigError, match="openvino") as refused:
        asyncio.run(build(artifact, asked, tmp_path, found))
    assert refused.value.key == "adapters"


@pytest.mark.parametrize("name", ["", "a b", "../a", "-a", "a" * 129])
def test_names_that_clients_could_not_use_are_refused(name):
    with pytest.raises(ConfigError, match="names have up to 128"):
        check_settings(ServingConfig(artifact="x", adapters={name: "folder"}))


def test_a_server_with_adapters(export, adapters, tmp_path):
    log = tmp_path / "requests.jsonl"
    words = [f"adapters.{name}={folder}" for name, folder in adapters.items()]
    process = Process(export, *words, f"log.requests={log}", "engine.num_threads=1")
    try:
        models = {m["id"]: m for m in httpx.get(f"{process.url}/v1/models").json()["data"]}
        assert {name: m["parent"] for name, m in models.items()} == {
            "tiny": None,
            "plain": "tiny",
            "patterns": "tiny",
        }
        texts = set()
        for name in models:
            body = {"model": name, "prompt": "the cat", "temperature": 0, "ignore_eos": True}
            answer = httpx.post(f"{process.url}/v1/completions", json=body, timeout=300)
            told = answer.json()
            texts.add(told["choices"][0]["text"])
            version = "+".join(part[:12] for part in models[name]["artifact"].split("+"))
            assert answer.headers["x-artifact-version"] == version
            assert told["system_fingerprint"] == f"fp_{version}" and told["model"] == name
            embedded = {"model": name, "input": "the cat"}
            vector = httpx.post(f"{process.url}/v1/embeddings", json=embedded, timeout=300)
            assert vector.headers["x-artifact-version"] == version
            metrics = httpx.get(f"{process.url}/metrics").text
            labels = f'model="{name}",version="{version}"'
            counted = f'spotforge_generation_tokens_total{{key="anonymous",{labels}}} 16.0'
            assert counted in metrics
        assert len(texts) == 3
        unknown = {"model": "no", "prompt": "a"}
        said = httpx.post(f"{process.url}/v1/completions", json=unknown, timeout=300)
        assert said.status_code == 404 and "plain" in said.json()["error"]["message"]
    finally:
        assert process.stop() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["model"]: line["artifact"] for line in lines} == {
        name: model["artifact"] for name, model in models.items()
    }


@pytest.mark.long
def test_a_swap_keeps_the_adapters_or_is_refused(export, adapters, tmp_path):
    save_model(tmp_path / "next", seed=1)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=320))
    shutil.copytree(export, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    folder = adapters["plain"]
    words = [f"adapters.plain={folder}", "admin_port=0", f"artifact_root={tmp_path}"]
    process = Process(export, *words, "engine.num_threads=1")
    try:
        swap = f"{process.admin_url()}/admin/swap"
        refused = httpx.post(swap, json={"artifact": "other"}, timeout=120)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "adapters.plain"
        swapped = httpx.post(swap, json={"artifact": "next"}, timeout=120).json()
        body = {"model": "plain", "prompt": [70, 71], "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{process.url}/v1/completions", json=body, timeout=300)
        version = f"{swapped['new']}+{resolve('plain', str(folder)).digest[:12]}"
        assert answer.headers["x-artifact-version"] == version
    finally:
        assert process.stop() == 0
