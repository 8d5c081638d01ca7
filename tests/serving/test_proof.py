"""That an engine computes what the model does is shown by numbers before anything is ready."""

import asyncio
import dataclasses
import json
import math
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from core.errors import ConfigError, SpotforgeError
from serving.artifact import resolve
from serving.config import EngineConfig, EngineName
from serving.engine import EngineError, EngineInfo, TokenChunk, TokenLogprob, TokenRequest, Unproven
from serving.engines import loading, selection
from serving.engines.buffers import restore_buffers
from serving.engines.forwards import check_causal, embedding
from serving.engines.lora import LoraLayers
from serving.engines.openvino import torch_logits
from serving.engines.plain_worker import PlainWorker
from serving.engines.proof import BOUNDS, Case, Proof, Scores, cases_of
from serving.engines.ties import Choices
from tests.families import zoo
from tests.serving.conftest import Process

VOCABULARY = 10


def right(token):
    """A made-up model: whatever came before, it gives token t the log-probability -t - 1."""
    return -float(token) - 1


class MadeUp:
    """An engine of that model, which may be off in one way of asking."""

    def __init__(self, off=0.0, where="", **info):
        self.info = EngineInfo(**{"engine": "made 1", "max_context": 64, "max_running": 8} | info)
        self.off, self.where, self.asked, self.closed = off, where, [], False

    async def submit(self, request):
        self.asked.append(request)
        off = self.off if self.where in request.id else 0.0
        for _ in range(request.max_tokens):
            await asyncio.sleep(0)
            top = [(t, right(t) + off) for t in range(request.logprobs)]
            yield TokenChunk([0], [TokenLogprob(right(0) + off, top)])

    async def start(self, prove):
        await prove(self)
        return self.info

    async def close(self):
        self.closed = True


async def plain(asked):
    return [Scores([right(0)] * len(a.of), [[right(t) for t in of] for of in a.of]) for a in asked]


def prove(engine, folder, cases=None, digest="d", dtype="float32", score=plain):
    cases = cases or [Case([1]), Case([1, 2, 3] * 20), Case([4, 5], "sql")]
    asyncio.run(Proof(folder, [digest], cases, dtype, dtype, score)(engine))
    return engine


def test_each_prompt_is_asked_in_a_batch_and_alone(tmp_path):
    asked = prove(MadeUp(), tmp_path).asked
    assert [(r.id.split("-")[1], r.adapter) for r in asked] == [
        *(("together", adapter) for adapter in (None, None, "sql")),
        *(("alone", adapter) for adapter in (None, None, "sql")),
    ]
    assert max(len(r.prompt) + r.max_tokens for r in asked) == 64  # a context, and no more
    assert all(r.temperature == 0 and r.ignore_eos for r in asked)


@pytest.mark.parametrize("where", ["together-0", "together-2", "alone-1"])
def test_one_prompt_in_one_way_is_enough_to_fail(tmp_path, where):
    for off in (0.01, math.nan, math.inf):
        with pytest.raises(Unproven, match="computes the model wrongly"):
            prove(MadeUp(off, where), tmp_path)
    assert not list(tmp_path.rglob("*.json"))
    prove(MadeUp(0.01, where), tmp_path, dtype="bfloat16")


def test_what_cannot_be_compared_is_not_proven(tmp_path):
    async def fails(asked):
        raise EngineError("no room")

    with pytest.raises(Unproven, match="plain forward, which fails: no room"):
        prove(MadeUp(), tmp_path, score=fails)
    with pytest.raises(Unproven, match="no log-probabilities"):
        prove(MadeUp(max_logprobs=-1), tmp_path)

    async def another(asked):  # it would have taken another token
        return [s._replace(best=[b + 1 for b in s.best]) for s in await plain(asked)]

    with pytest.raises(Unproven, match="computes the model wrongly"):
        prove(MadeUp(), tmp_path, score=another)


def test_a_proof_is_kept_by_artifact_engine_versions_and_type(tmp_path):
    prove(MadeUp(), tmp_path)
    assert prove(MadeUp(), tmp_path).asked == []
    assert prove(MadeUp(), tmp_path, digest="e").asked
    assert prove(MadeUp(), tmp_path, dtype="bfloat16").asked
    assert prove(MadeUp(engine="made 2"), tmp_path).asked
    assert prove(MadeUp(built_with="torch 3"), tmp_path).asked
    assert prove(MadeUp(), tmp_path, cases=[Case([1], "other")]).asked


def test_prompts_go_beyond_where_a_model_changes():
    config = {"vocab_size": VOCABULARY, "max_position_embeddings": 4096}
    longest = lambda **more: max(  # noqa: E731
        len(case.prompt) for case in cases_of(config | more, 10**6, False, [])
    )
    assert longest(sliding_window=300) > 300
    assert longest(attention_chunk_size=200) > 200
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 512}
    assert longest(rope_parameters=rope) == 4096
    too_dear = cases_of(config | {"sliding_window": 4000}, 10**11, False, [])
    assert max(len(case.prompt) for case in too_dear) < 4000
    adapted = cases_of(config, 10**6, False, ["a", "b"])
    assert {case.adapter for case in adapted} == {None, "a", "b"}


@pytest.fixture
def engines(export, monkeypatch, tmp_path):
    """Starts an artifact by made-up engines, of which some are wrong."""

    def start(asked, wrong):
        built = []

        def torch_engine(name, artifact, config, adapters, why):
            engine = MadeUp(1.0 if name.value in wrong else 0.0)
            built.append((name.value, engine))
            return selection.Choice(engine, name, why, "float32", plain, "float32")

        monkeypatch.setattr(selection, "_torch", torch_engine)
        monkeypatch.setattr(selection, "_why_not_openvino", lambda _: "there is none")
        artifact, config = resolve(str(export)), EngineConfig(name=EngineName(asked))
        try:
            started = asyncio.run(selection.start(artifact, config, tmp_path / "-".join(wrong), {}))
        finally:
            names = [name for name, _ in built]
            open_ones = [name for name, engine in built if not engine.closed]
        return names, open_ones, started

    return start


def test_auto_takes_the_plain_engine_after_a_failed_proof_only(engines):
    names, _, started = engines("auto", [])
    assert names == ["transformers"] and "there is none" in started.why
    names, open_ones, started = engines("auto", ["transformers"])
    assert names == ["transformers", "plain"] and open_ones == ["plain"]
    assert started.why.startswith("plain, since transformers: computes")


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [("transformers", ["transformers"]), ("plain", ["plain"]), ("auto", ["transformers", "plain"])],
)
def test_what_no_engine_proves_is_refused(engines, asked, wrong):
    with pytest.raises(ConfigError, match="is not served: ") as refused:
        engines(asked, wrong)
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)


class HeardLines:
    """What a program says."""

    def __init__(self):
        self.said = []

    def say(self, kind, content):
        self.said.append((kind, content))


def submitted(worker, requests):
    """Tokens and log-probabilities that a program tells of some requests."""
    for request in requests:
        worker._on_submit(dataclasses.asdict(request))
    while worker._told:
        worker._advance()
    found = {request.id: ([], []) for request in requests}
    for kind, content in worker._lines.said:
        assert kind in ("ready", "step"), content
        for name, tokens, logprobs in content.get("tokens", ()):
            found[name][0].extend(tokens)
            found[name][1].extend(own for own, _ in logprobs or ())
    return found


def settings_of(folder, **settings):
    most = {"max_context": 128, "max_running": 4, "max_batch_tokens": 64, "kv_cache_tokens": 1024}
    of = {"folder": str(folder), "target": None, "num_threads": 1, **most, **settings}
    return loading.Settings(**of)


@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        "mamba",
        pytest.param("falcon", marks=pytest.mark.long),
        pytest.param("falcon_rw", marks=pytest.mark.long),
    ],
)
def test_the_plain_engine_computes_what_generate_does(tmp_path, family):
    zoo.build(family, tmp_path)
    worker = PlainWorker(settings_of(tmp_path), HeardLines())
    prompts = {"a": [7, 8, 9], "b": list(range(10, 40))}
    requests = [
        TokenRequest(name, prompt, 12, temperature=0, logprobs=0, ignore_eos=True)
        for name, prompt in prompts.items()
    ]
    found = submitted(worker, requests)
    attention = zoo.FAMILIES[family].attention
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    for name, prompt in prompts.items():
        ids = torch.tensor([prompt])
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens, logprobs = found[name]
        assert tokens == wanted.sequences[0, len(prompt) :].tolist()
        rows = [row[0].log_softmax(-1) for row in wanted.logits]
        assert logprobs == pytest.approx(
            [row[token].item() for row, token in zip(rows, tokens, strict=True)], abs=1e-4
        )
    info = dict(worker._lines.said)["ready"]
    assert info["max_running"] == 4 and "embeddings" in info["features"]


class OfWorker:
    """A program in this process, as an engine and as a plain forward."""

    def __init__(self, folder):
        self.worker = PlainWorker(settings_of(folder), HeardLines())
        self.info = EngineInfo(**dict(self.worker._lines.said)["ready"])
        self.forwards = 0

    async def submit(self, request):
        self.worker._lines.said.clear()
        submitted(self.worker, [request])
        for _, step in self.worker._lines.said:
            [(_, tokens, logprobs)] = step["tokens"]
            yield TokenChunk(tokens, [TokenLogprob(*told) for told in logprobs])

    async def score(self, asked):
        scored = []
        for one in asked:
            self.forwards += 1
            told = self.worker._scorer.score(one._asdict())
            rows, ties = told["scores"], tuple(map(tuple, told["ties"]))
            scored.append(Scores([row[0] for row in rows], [row[1:] for row in rows], ties))
        return scored


def tie_experts(model, prompt, side):
    """Has the router's second and third expert be all but equal before the first new token.

    Side 1 and -1 are as far from each other as two orders of the same sums.
    """
    gate, heard = model.model.layers[0].mlp.gate, []
    hook = gate.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([prompt]))
        hook.remove()
        last = heard[0].reshape(len(prompt), -1)[-1]
        logits = gate.weight @ last
        _, second, third = logits.topk(3).indices
        gap = logits[second] - logits[third] - side * 1e-5
        gate.weight[third] += gap * last / last.square().sum()


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Mixtral with a tie after a prompt, as two machines would have it, and one made wrong."""
    folder, prompt = tmp_path_factory.mktemp("mixtral"), list(range(20, 60))
    made = []
    for name, side, experts in (("here", 1, 2), ("there", -1, 2), ("wrong", -1, 1)):
        model = zoo.make("mixtral")
        tie_experts(model, prompt, side)
        model.config.num_experts_per_tok = experts
        model.save_pretrained(folder / name)
        zoo.byte_tokenizer().save_pretrained(folder / name)
        made.append(OfWorker(folder / name))
    return [Case(prompt)], *made


def test_a_router_whose_choice_rounding_decides_may_take_either_expert(tmp_path, mixtures):
    cases, here, there, _ = mixtures

    async def without_ties(asked):
        return [s._replace(ties=()) for s in await here.score(asked)]

    with pytest.raises(Unproven, match="computes the model wrongly"):
        prove(there, tmp_path, cases, score=without_ties)
    prove(there, tmp_path, cases, score=here.score)


def test_ties_are_turned_until_the_engines_choices_are_found(tmp_path):
    ties = [(0, 5), (1, 2), (1, 7), (3, 4)]

    def choosing(others, seen):
        """A plain forward that is off by what each choice is worth, if it is not the engine's."""

        async def score(asked):
            seen.extend(a.turned for a in asked)
            scored = await plain(asked)
            for i, a in enumerate(asked):
                off = sum(0.01 * (1 + ties.index(t)) for t in {*others} ^ {*a.turned})
                of = [[p + off for p in row] for row in scored[i].of]
                scored[i] = Scores([b + off for b in scored[i].best], of, tuple(ties))
            return scored

        return score

    seen = []
    prove(MadeUp(), tmp_path, [Case([1])], score=choosing([ties[1], ties[2]], seen))
    assert seen[-1] == (ties[1], ties[2])
    with pytest.raises(Unproven):  # it is no tie, and stays off
        prove(MadeUp(0.05), tmp_path, [Case([2] * 2)], score=choosing([], seen))


def test_ties_excuse_no_wrong_mixture(tmp_path, mixtures):
    cases, here, _, wrong = mixtures
    with pytest.raises(Unproven, match="computes the model wrongly"):
        prove(wrong, tmp_path, cases, score=here.score)
    here.forwards = 0
    prove(here, tmp_path, cases, score=here.score)
    assert here.forwards == 2  # where nothing is off, nothing is turned


def test_only_what_is_nearly_equal_is_a_tie():
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.3 - 1e-7], [0.4, 0.3, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5]])
    with Choices() as choices:
        taken = scores.topk(2).indices.tolist()
        torch.topk(scores[:, :2], 2)  # takes all there are
        torch.topk(scores.masked_fill(scores < 0.39, -math.inf), 2, dim=-1, sorted=False)
    assert taken == scores.topk(2).indices.tolist()
    assert choices.ties == [(0, 2), (2, 2), (0, 0)]
    with Choices([(0, 0), (7, 1)]) as choices:
        values, indices = torch.topk(scores, k=2, dim=1)
    assert indices.tolist()[:2] == [[0, 3], [0, 1]] and values[0, 1] == scores[0, 3]


def test_embeddings_need_no_cache_of_pages():
    model = zoo.make("gemma2")
    wanted = embedding(model, [5, 6, 7])
    model.set_attn_implementation("paged|eager")  # as continuous batching leaves it
    assert embedding(model, [5, 6, 7]) == pytest.approx(wanted, abs=1e-6)
    assert model.config._attn_implementation == "paged|eager"


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        (BertConfig(is_decoder=False), BertForMaskedLM, "is not served: .* is an encoder"),
        (T5Config(d_model=16, d_kv=8, d_ff=16), T5ForConditionalGeneration, "is not served: t5"),
        (LlamaConfig(), LlamaModel, "saved as LlamaModel, .* saved from a LlamaForCausalLM"),
    ],
)
def test_what_completes_no_text_is_refused_in_a_line_that_says_why(tmp_path, config, kind, said):
    sizes = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 16, "num_layers": 1}
    for name, size in (sizes | {"num_hidden_layers": 1, "num_attention_heads": 2}).items():
        setattr(config, name, size)
    kind(config).save_pretrained(tmp_path)
    zoo.byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=said) as refused:
        PlainWorker(settings_of(tmp_path), HeardLines())
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)


def test_a_folder_without_a_vocabulary_is_no_language_model(export, tmp_path):
    folder = shutil.copytree(export, tmp_path / "pictures")
    config = json.loads((folder / "config.json").read_text())
    del config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is not served: .*vocab_size"):
        asyncio.run(selection.start(resolve(str(folder)), EngineConfig(), tmp_path, {}))


@pytest.mark.long
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_no_family_is_taken_for_an_encoder(family):
    check_causal(zoo.make(family), family)


def tiny_llama():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **sizes)
    return LlamaForCausalLM(config).eval()


def test_buffers_that_loading_left_without_values_are_computed_anew():
    model = tiny_llama()
    assert restore_buffers(model) == []
    wanted = model.model.rotary_emb.inv_freq.clone()
    model.model.rotary_emb.inv_freq.fill_(1e-9)
    model.model.rotary_emb.original_inv_freq.fill_(math.nan)
    names = ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"]
    assert sorted(restore_buffers(model)) == names
    assert torch.equal(model.model.rotary_emb.inv_freq, wanted)


def test_a_merged_adapter_computes_what_its_hooks_do(tmp_path):
    model = tiny_llama()
    layers = LoraLayers(model, [])
    layer = "model.layers.0.mlp.up_proj"
    down, up = torch.randn(16, 2), torch.randn(2, 16)
    layers._updates["sql"] = {layer: (down, up)}
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        with layers.merged("sql", model):
            merged = model(ids).logits
        hook = model.get_submodule(layer).register_forward_hook(
            lambda _, args, output: output + args[0] @ down @ up
        )
        assert torch.allclose(merged, model(ids).logits, atol=1e-5)
        hook.remove()
        assert torch.equal(model(ids).logits, before)
        assert not torch.allclose(merged, before, atol=1e-3)


def test_bounds_are_of_every_type():
    assert {"float32", "bfloat16", "float16", "int8", "int4"} <= BOUNDS.keys()


@pytest.mark.long
@pytest.mark.parametrize("family", ["gemma2", "falcon"])
def test_a_family_that_continuous_batching_computes_wrongly_is_served_right(tmp_path, family):
    folder = zoo.build(family, tmp_path / family)
    server = Process(folder, "engine.num_threads=1", f"cache={tmp_path}/cache")
    try:
        ready = httpx.get(f"{server.url}/readyz").json()
        assert ready["engines"][server.name].startswith("plain, since transformers: ")
        prompt = list(range(20, 50))
        asked = {"model": server.name, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=asked | {"logprobs": 0}).json()
    finally:
        server.stop()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.tensor([prompt])
    wanted = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = wanted.sequences[0, len(prompt) :]
    rows = [row[0].log_softmax(-1) for row in wanted.logits]
    logprobs = [row[token].item() for row, token in zip(rows, new.tolist(), strict=True)]
    told = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert told == pytest.approx(logprobs[: len(told)], abs=1e-4) and len(told) >= len(logprobs) - 1
    assert [json.loads(path.read_text())["dtype"] for path in Path(tmp_path).rglob("proofs/*")]


@pytest.mark.long
def test_a_fresh_process_computes_what_a_plain_forward_does(export):
    """It is what vLLM and IRs are compared with."""
    tokens = np.random.default_rng(0).integers(0, 300, (2, 9))
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits
    found = torch.from_numpy(torch_logits(export, tokens))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(SpotforgeError, match="does not load in a fresh process"):
        torch_logits(export / "none", tokens)
