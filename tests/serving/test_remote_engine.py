"""Engines behind OpenAI's API: a server elsewhere, and a vLLM of our own."""

import asyncio
import dataclasses
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest

from core.errors import ConfigError, MissingExtraError, SpotforgeError
from core.settings.rules import check_settings
from serving.artifact import resolve
from serving.config import EngineConfig, EngineName, ServingConfig
from serving.deployment import Deployment
from serving.engine import EngineError, EngineRefused, TokenRequest, Unproven
from serving.engines import vllm
from serving.engines.process import watch_of
from serving.engines.proof import Case, Proof, Scores
from serving.engines.selection import build
from serving.gateway.errors import response_to
from serving.gateway.generation import lost
from serving.rollout import Rollout
from serving.text.pipeline import LocalStages
from tests.serving.completions_server import FakeServer
from tests.serving.conftest import until

PROMPT = [5, 6, 7]


def remote(export, url, **settings):
    config = EngineConfig(name=EngineName.remote, url=url, **settings)
    check_settings(config)
    return asyncio.run(build(resolve(str(export)), config, Path("unused"), {}))[0]


def with_remote(export, work, fake=None, **settings):
    """Runs `work(engine, server)` over an engine that is started."""

    async def run():
        server = fake or FakeServer()
        await server.start()
        config = EngineConfig(name=EngineName.remote, url=f"{server.url}/v1/", **settings)
        try:
            engine, *_ = await build(resolve(str(export)), config, Path("unused"), {})
            try:
                await engine.start()
                return await work(engine, server)
            finally:
                await engine.close()
        finally:
            await server.stop()

    return asyncio.run(run())


async def chunks_of(engine, max_tokens=8, prompt=PROMPT, **settings):
    return [c async for c in engine.submit(TokenRequest("a", prompt, max_tokens, **settings))]


async def chunks_of_one_that_is_held(engine, holds, lose):
    """Calls `lose` once the tokens have come that come as long as the file `holds` exists."""
    holds.touch()
    chunks = []
    async for chunk in engine.submit(TokenRequest("a", PROMPT, 40)):
        chunks.append(chunk)
        if len(chunks) == 10:
            lose()
            holds.unlink()
    return chunks


def tokens_of(chunks):
    return [token for chunk in chunks for token in chunk.tokens]


def test_vllm_tells_token_ids(export):
    async def work(engine, server):
        assert (engine.info.engine, engine.info.max_context) == ("vllm 0.32.0", 128)
        choices = ["top_k", "min_p", "repetition_penalty"]
        assert engine.info.features == ["json_schema", "logprobs_when_sampling", *choices]
        chunks = await chunks_of(engine, seed=-1, temperature=0.5, top_p=0.9, logprobs=2)
        assert tokens_of(chunks) == list(range(8, 16))
        assert chunks[-1].finish_reason == "length"
        assert chunks[0].logprobs == [(-1.0, [(8, -1.0), (9, -2.0)])]
        body = server.seen[-1]
        assert body["prompt"] == PROMPT and body["seed"] == 2**63 - 1
        assert (body["temperature"], body["top_p"], body["top_k"]) == (0.5, 0.9, 0)
        # The token that ends a text is none of it; one that is no alternative is not told as one.
        ended = await chunks_of(engine, prompt=[46], max_tokens=20, logprobs=0)
        assert (tokens_of(ended), ended[-1].finish_reason) == ([47, 48, 49], "stop")
        assert [len(c.logprobs) for c in ended] == [1, 1, 1, 0]
        assert ended[0].logprobs == [(-1.0, [])]
        assert tokens_of(await chunks_of(engine, prompt=[46], ignore_eos=True))[3] == 50
        schema = {"type": "object"}
        await chunks_of(engine, schema=schema)
        told = server.seen[-1]["response_format"]
        assert told == {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        stats = engine.stats()
        assert (stats.running, stats.prompt_tokens, stats.generation_tokens) == (0, 8, 27)

    with_remote(export, work)


@pytest.mark.parametrize("tells_usage", [True, False])
def test_text_is_counted_by_usage(export, tells_usage):
    async def work(engine, server):
        server.tells_usage = tells_usage
        assert (engine.info.engine, engine.info.max_logprobs) == ("remote m", -1)
        assert (engine.info.max_context, engine.info.features) == (512, [])
        chunks = await chunks_of(engine, max_tokens=4)
        assert "".join(c.text for c in chunks) == "".join(f"{t}\u2028" for t in range(8, 12))
        assert [c.num_tokens for c in chunks] == [1, 1, 1, 1, 2 if tells_usage else 0]
        assert [c.finish_reason for c in chunks] == [None] * 4 + ["length"]
        # What OpenAI's API does not have is not sent.
        assert not {"top_k", "return_token_ids", "ignore_eos"} & set(server.seen[-1])

    with_remote(export, work, FakeServer(tells_ids=False))


def test_what_breaks_goes_on_where_it_was(export):
    async def work(engine, server):
        for name in ("breaks_after", "errs_after"):
            setattr(server, name, 3)
            chunks = await chunks_of(engine, seed=9)
            assert tokens_of(chunks) == list(range(8, 16))
            assert server.seen[-1]["prompt"] == [*PROMPT, 8, 9, 10]
            assert (server.seen[-1]["max_tokens"], server.seen[-1]["seed"]) == (5, 12)
        server.breaks_after = 3
        with pytest.raises(EngineError):
            await chunks_of(engine, schema={"type": "object"})
        server.errs_after, server.error_code = 0, 400
        with pytest.raises(EngineRefused, match="it failed"):
            await chunks_of(engine)
        assert engine.is_ready

    with_remote(export, work)


def test_text_that_has_begun_is_lost(export):
    async def work(engine, server):
        server.breaks_after = 0
        assert len(await chunks_of(engine, max_tokens=4)) == 5  # nothing had come
        server.breaks_after = 1
        with pytest.raises(EngineError):
            await chunks_of(engine)

    with_remote(export, work, FakeServer(tells_ids=False))


def test_a_stall_is_an_error(export):
    async def work(engine, server):
        assert engine._client._http.timeout.read == 50
        engine._client._http.timeout = httpx.Timeout(0.3)  # only now: a slow start is no stall
        server.stalls_after = 2
        with pytest.raises(EngineError, match="nothing for 0.3 s"):
            await chunks_of(engine)

    with_remote(export, work, step_timeout_s=50)


def test_leaving_early_cancels(export):
    async def work(engine, server):
        server.token_s = 0.01
        stream = engine.submit(TokenRequest("a", PROMPT, 100))
        await anext(stream)
        assert engine.stats().running == 1
        await stream.aclose()
        assert engine.stats().running == 0
        await until(lambda: server.cancelled, "the server has seen it go")

    with_remote(export, work)


@pytest.mark.parametrize(
    "status, headers, told, retry_after_s",
    [
        (429, ["retry-after: 7"], 429, 7),
        (503, [], 429, 1),
        (400, [], 400, None),
        (401, [], 503, 1),
    ],
)
def test_refusals(export, status, headers, told, retry_after_s):
    async def work(engine, server):
        server.refuses = status, headers, "not\nnow"
        with pytest.raises(EngineError) as raised:
            await chunks_of(engine)
        assert isinstance(raised.value, EngineRefused) == (status != 401)
        error = lost(raised.value)
        assert (response_to(error).status_code, error.retry_after_s) == (told, retry_after_s)
        assert f"not now (status {status})" in str(error)

    with_remote(export, work)


def test_readiness_is_a_token(export):
    async def work(engine, server):
        server.refuses = 503, [], "busy"
        await until(lambda: not engine.is_ready, "a probe that is refused")
        server.refuses = None
        await until(lambda: engine.is_ready, "a probe that is answered")
        asked = len(server.seen)
        await until(lambda: len(server.seen) >= asked + 2, "two more probes")
        assert engine.stats().kv_cache_usage == 0.25
        assert server.seen[-1]["max_tokens"] == 1

    with_remote(export, work, probe_interval_s=0.1)


def test_keys_models_and_contexts(export, monkeypatch):
    monkeypatch.setenv("THEIR_KEY", "sk-1")

    async def work(engine, server):
        assert {h["authorization"] for h in server.headers} == {"bearer sk-1"}
        assert server.seen[0]["model"] == "b"
        assert engine.info.max_context == 100

    fake = FakeServer(models=("a", "b"))
    settings = {"api_key_env": "THEIR_KEY", "remote_model": "b"}
    with_remote(export, work, fake, max_context=100, **settings)
    for wrong, rule in (
        ({"remote_model": None}, "must be given: the server has a, b"),
        ({"remote_model": "c"}, "is not one of the server's models: a, b"),
        ({"max_context": 200}, "the server's context has 128 tokens"),
        ({"api_key_env": "NO_KEY"}, "is not in the environment"),
    ):
        with pytest.raises(ConfigError, match=rule):
            with_remote(export, work, FakeServer(models=("a", "b")), **{**settings, **wrong})


def test_settings_that_cannot_be(export):
    for config, key in (
        (EngineConfig(name=EngineName.remote), "engine.url"),
        (EngineConfig(url="http://a"), "engine.url"),
        (EngineConfig(name=EngineName.remote, url="http://a", kv_cache_mb=1), "engine.kv_cache_mb"),
    ):
        with pytest.raises(ConfigError, match=key):
            check_settings(ServingConfig(artifact="a", engine=config))
    with pytest.raises(ConfigError, match="engine.url=localhost:8000"):
        remote(export, "localhost:8000")

    async def start():
        config = EngineConfig(name=EngineName.remote, url="http://127.0.0.1:9")
        whole = ServingConfig(artifact="a", engine=config)
        with pytest.raises(ConfigError, match="engine.name=remote"):
            await Rollout(None, whole, Path("unused"), Path("."), print).swap(str(export))
        engine, *_ = await build(resolve(str(export)), config, Path("unused"), {})
        with pytest.raises(SpotforgeError, match="cannot be reached"):
            await engine.start()
        await engine.close()

    asyncio.run(start())


def test_a_gateway_is_a_server_like_any(export, served):
    """Text in place of ids: what comes through is what the other gateway told its clients."""
    with served(token_s=0.001) as behind:

        async def generate(stop):
            config = EngineConfig(name=EngineName.remote, url=behind.url)
            engine, *_ = await build(behind.artifact, config, Path("unused"), {})
            deployment = Deployment(behind.artifact, engine, LocalStages(behind.files))
            try:
                info = await engine.start()
                assert info.engine == "remote tiny"
                request = TokenRequest("a", behind.engine.tokens[:2], 30)
                return [chunk async for chunk in deployment.generate(request, stop)]
            finally:
                await deployment.close()

        for stop, reason in ((["on a"], "stop"), ([], "length")):
            chunks = asyncio.run(generate(stop))
            asked = {"model": "tiny", "prompt": behind.engine.tokens[:2], "max_tokens": 30}
            told = httpx.post(f"{behind.url}/v1/completions", json=asked | {"stop": stop}).json()
            assert "".join(c.text for c in chunks) == told["choices"][0]["text"]
            assert chunks[-1].finish_reason == told["choices"][0]["finish_reason"] == reason
            if reason == "length":
                counted = sum(c.num_tokens for c in chunks)
                assert counted == told["usage"]["completion_tokens"] == 30


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """A Python that has a vLLM, as SPOTFORGE_VLLM_PYTHON wants it; returns what it noted."""
    program = tmp_path / "python"
    file = Path(__file__).with_name("completions_server.py")
    # $1 to $3 are -I -m vllm.entrypoints.cli.main
    program.write_text(
        f'#!/bin/sh\n[ "$1 $2 $3" = "-I -m vllm.entrypoints.cli.main" ] || exit 9\n'
        f'shift 3\nexec {sys.executable} -I {file} "$@"\n'
    )
    program.chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv(vllm.PYTHON, str(program))
    monkeypatch.setenv("FAKE_VLLM_LOG", str(log))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def with_vllm(export, work, **settings):
    async def run():
        config = EngineConfig(name=EngineName.vllm, max_running=4, max_context=100, **settings)
        engine, *_ = await build(resolve(str(export)), config, Path("unused"), {})
        try:
            await engine.start()
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def test_a_vllm_of_our_own(export, fake_vllm, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_VLLM_HOLDS", str(tmp_path / "holds"))

    async def work(engine):
        assert engine.info.engine == "vllm 0.32.0"
        assert (engine.info.max_context, engine.info.max_running) == (100, 4)
        words = fake_vllm()[0]
        assert words[1:3] == ["serve", str(export)]
        flags = dict(zip(words[3:-4:2], words[4:-4:2], strict=True))
        assert flags["--max-num-queued-reqs"] == "9" and flags["--max-num-seqs"] == "4"
        assert flags["--shutdown-timeout"] == "10" and flags["--max-model-len"] == "100"
        assert flags["--max-num-batched-tokens"] == "512"
        assert os.stat(Path(words[-1]).parent).st_mode & 0o777 == 0o700
        folder = Path(words[-1]).parent
        for number in (signal.SIGKILL, signal.SIGSTOP):
            pid, restarts = engine.pid, engine.stats().restarts
            lose = partial(os.kill, pid, number)
            async with asyncio.timeout(300):
                chunks = await chunks_of_one_that_is_held(engine, tmp_path / "holds", lose)
            assert tokens_of(chunks) == list(range(8, 48))
            assert engine.stats().restarts == restarts + 1
            await until(lambda: engine.is_ready, "the other process is ready")
            assert engine.pid != pid
        engine._reaper.stdin.close()  # as the kernel does when the gateway is killed
        await until(lambda: engine.stats().restarts == 3, "a third process is started")
        await until(lambda: engine.is_ready, "the third process is ready")
        return folder

    def quick(config):
        return dataclasses.replace(watch_of(config), probe_timeout_s=5.0)

    monkeypatch.setattr("serving.engines.selection.watch_of", quick)
    folder = with_vllm(export, work, probe_interval_s=0.2, max_batch_tokens=512)
    assert not folder.exists()
    assert fake_vllm()[-1] == "SIGTERM"


def test_a_vllm_that_does_not_start_says_why(export, fake_vllm, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_FAILS", "1")
    with pytest.raises(SpotforgeError, match="^vllm: ValueError: no such layer$"):
        with_vllm(export, None)


def test_a_vllm_that_computes_something_else_is_not_kept(export, fake_vllm, tmp_path):
    async def plain(asked):
        return [Scores([-9.0] * len(a.of), [[-9.0] * len(of) for of in a.of]) for a in asked]

    async def start():
        config = EngineConfig(name=EngineName.vllm, max_running=4, max_context=100)
        engine, *_ = await build(resolve(str(export)), config, Path("unused"), {})
        proof = Proof(tmp_path, ["d"], [Case(PROMPT)], "float32", "float32", plain)
        with pytest.raises(Unproven, match="computes the model wrongly"):
            await engine.start(proof)
        assert engine.pid is None

    asyncio.run(start())


def test_what_vllm_cannot_load(export, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm.gpus, "has_gpu", lambda: False)
    with pytest.raises(MissingExtraError, match=vllm.PYTHON):
        monkeypatch.delenv(vllm.PYTHON, raising=False)
        with_vllm(export, None)
    monkeypatch.setenv(vllm.PYTHON, sys.executable)
    with pytest.raises(ConfigError, match="at least engine.max_running"):
        with_vllm(export, None, max_batch_tokens=2)
    for file, why in (("model.gguf", "gguf"), ("openvino_model.xml", "openvino")):
        folder = tmp_path / why
        folder.mkdir()
        (folder / "config.json").write_text('{"max_position_embeddings": 512}')
        (folder / file).touch()
        with pytest.raises(ConfigError, match=f"vLLM does not load {why}"):
            with_vllm(folder, None)
    folder = tmp_path / "torchao"
    folder.mkdir()
    quantization = {"quantization_config": {"quant_method": "torchao"}}
    described = {"max_position_embeddings": 512, **quantization}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="torchao only on a GPU"):
        with_vllm(folder, None)
    monkeypatch.setattr(vllm.gpus, "has_gpu", lambda: True)
    monkeypatch.setattr(vllm, "_capability", lambda: 7.0)
    with pytest.raises(ConfigError, match="compute capability 7.5 .* has 7.0"):
        with_vllm(folder, None)


def test_auto_takes_vllm_where_there_is_a_gpu(export, fake_vllm, monkeypatch):
    monkeypatch.setenv("SPOTFORGE_OPENVINO_PYTHON", "")

    async def choose():
        engine, _, why, *_ = await build(resolve(str(export)), EngineConfig(), Path("unused"), {})
        await engine.close()
        return type(engine).__name__, why

    for has_gpu, python, name, reason in (
        (True, True, "VllmEngine", "this host has a GPU, and SPOTFORGE_VLLM_PYTHON is set"),
        (True, False, "ProcessEngine", "SPOTFORGE_VLLM_PYTHON is not set"),
        (False, True, "ProcessEngine", "SPOTFORGE_OPENVINO_PYTHON is not set"),
    ):
        monkeypatch.setattr(vllm.gpus, "has_gpu", lambda has_gpu=has_gpu: has_gpu)
        if not python:
            monkeypatch.delenv(vllm.PYTHON)
        found, why = asyncio.run(choose())
        assert found == name and reason in why
