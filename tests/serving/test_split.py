"""Text stages as processes: they say what one process says, and survive what happens to theirs."""

import asyncio
import json
import os
import re
import signal
import time
from pathlib import Path

import httpx
import pytest

from core.errors import ConfigError, SpotforgeError
from core.settings.rules import check_settings
from serving.artifact import resolve
from serving.config import ServingConfig, TextConfig, Topology
from serving.deployment import Deployment
from serving.engine import EngineError, TokenRequest
from serving.gateway.app import make_app
from serving.gateway.gateway import Gateway
from serving.models import Model
from serving.telemetry import Telemetry
from serving.text import pool
from serving.text.codec import Chat, TextError
from serving.text.pipeline import LocalStages
from serving.text.split import SplitStages
from serving.text.tokenizer import TokenizerFiles, load
from tests import programs
from tests.serving.conftest import FakeEngine, Process, until

TEXT = "naïve ☕🦊 the cat sat on a mat, 日本 and dogs ran\n"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def files(export, tmp_path_factory):
    return load(resolve(str(export)), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def split(files, runner):
    """Two processes of each stage, for all tests: whatever one does to them, they come back."""
    stages = SplitStages(files, encoders=2, decoders=2, silence_s=1.0)
    runner.run(stages.start())
    yield stages
    runner.run(stages.close())


def deployment(export, files, text, token_s=0.0):
    engine = FakeEngine(files.tokenizer().encode(TEXT).ids, token_s, max_running=16)
    return Deployment(resolve(str(export)), engine, text)


async def post(served, path, body, **headers):
    """What the gateway answers, over some deployment."""
    config = ServingConfig(artifact=served.artifact.name)
    gateway = Gateway(config, None, Telemetry(config.log))
    gateway.models["tiny"] = Model("tiny", served, 1)
    transport = httpx.ASGITransport(make_app(gateway))
    headers = {"content-type": "application/json", **headers}
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.post(f"/v1/{path}", content=json.dumps(body), headers=headers)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("completions", {"prompt": "the cat", "n": 2}, 200),
        ("completions", {"prompt": ["naïve", "日本"], "logprobs": 1}, 200),
        ("completions", {"prompt": "a", "stop": ["sat on", "日"], "stream": True}, 200),
        ("completions", {"prompt": "a", "max_tokens": 7, "stream": True, "logprobs": 0}, 200),
        ("completions", {"prompt": ["fine", "half \ud83e of it", ""]}, 400),
        ("chat/completions", {"logprobs": True, "top_logprobs": 1, "stream": True}, 200),
        ("chat/completions", {"stop": "zzz", "tools": [TOOL]}, 200),
        ("chat/completions", {"stop": "🦊", "chat_template_kwargs": {"x": [1, None]}}, 200),
    ],
)
def test_the_same_answers(export, files, split, runner, path, body, status):
    body = {"model": "tiny", "max_tokens": 40, **body}
    if path.startswith("chat"):
        body["messages"] = [{"role": "user", "content": "naïve ☕"}]

    async def ask(text):
        served = deployment(export, files, text)
        answer = await post(served, path, body)
        said = answer.text.replace(answer.headers.get("x-request-id", "no id"), "ID")
        prompts = [request.prompt for request in served.engine.seen]
        return answer.status_code, re.sub(r'"created":\d+', "", said), prompts

    local, apart = runner.run(ask(LocalStages(files))), runner.run(ask(split))
    assert local == apart
    assert local[0] == status


async def chunks_of(served, count, stop=("zzz", "\n")):
    """All chunks of some sequences that run at once, of different lengths."""

    async def one(i):
        request = TokenRequest(f"s{i}", [70], 120 + i, logprobs=1)
        return [chunk async for chunk in served.generate(request, stop[: i % 2])]

    return await asyncio.gather(*(one(i) for i in range(count)))


def test_decoders_share_the_sequences(export, files, split, runner):
    async def work():
        running = asyncio.create_task(chunks_of(deployment(export, files, split, 0.01), 8))
        loads = [worker.load for worker in split.decoders.workers]
        while sum(loads) < 8:  # without a pause, in which all might end on a slow machine
            assert not running.done()
            await asyncio.sleep(0)
            loads = [worker.load for worker in split.decoders.workers]
        await running
        return loads, [worker.load for worker in split.decoders.workers]

    assert runner.run(work()) == ([4, 4], [0, 0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_outlive_their_decoder(export, files, split, runner, number):
    async def work():
        wanted = await chunks_of(deployment(export, files, LocalStages(files)), 8)
        running = asyncio.create_task(chunks_of(deployment(export, files, split, 0.01), 8))
        worker, restarts = split.decoders.workers[0], split.restarts
        while worker.load < 4:
            await asyncio.sleep(0)
        await asyncio.sleep(0.3)  # some tokens on, of 120 that take 0.01 s each
        assert not running.done()
        pid = worker.pid
        os.kill(pid, number)
        await until(lambda: split.restarts > restarts, "the decoder's replacement")
        assert await running == wanted
        await until(lambda: worker.is_up, "the decoder is up again")
        assert split.is_ready and not is_alive(pid)

    runner.run(work())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_prompts_outlive_their_encoder(files, split, runner, number):
    async def work():
        prompts = [f"{i} naïve {'cat ' * (i % 50)}" for i in range(400)]
        wanted = await LocalStages(files).encode(prompts)
        worker = split.encoders.workers[1]
        restarts = split.restarts
        running = asyncio.create_task(split.encode(prompts))
        while not worker.load:
            await asyncio.sleep(0)
        os.kill(worker.pid, number)
        assert worker.load, "it was too late"
        assert await running == wanted
        await until(lambda: split.restarts > restarts, "the encoder's replacement")
        await until(lambda: worker.is_up, "the encoder is up again")

    runner.run(work())


def test_nobody_lives(export, files, split, runner, monkeypatch):
    launch, may_launch = pool.Worker.launch, asyncio.Event()

    async def launch_later(worker):
        await may_launch.wait()  # the first could be up again before the last is gone
        await launch(worker)

    monkeypatch.setattr(pool.Worker, "launch", launch_later)

    async def work():
        workers = split.encoders.workers + split.decoders.workers
        served = deployment(export, files, split)
        wanted = await chunks_of(deployment(export, files, LocalStages(files)), 2)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: not any(worker.is_up for worker in workers), "all are down")
        assert not served.is_ready
        asked = asyncio.gather(split.encode(["the cat"]), chunks_of(served, 2))
        await asyncio.sleep(0.02)
        assert not asked.done()
        may_launch.set()
        ids, found = await asked
        assert ids == await LocalStages(files).encode(["the cat"]) and found == wanted
        await until(lambda: all(worker.is_up for worker in workers), "all are up again")
        assert served.is_ready

    runner.run(work())


def test_a_long_prompt_holds_up_no_other(files, split, runner):
    async def work():
        long = "the cat sat " * 120_000
        ended = []

        async def encode(name, text):
            found = await split.encode([text])
            ended.append(name)
            return found

        async with asyncio.TaskGroup() as group:
            # Stopped until they have been sent everything: on a machine that lets this process
            # wait, the long ones would have ended before the short ones come.
            pids = [worker.pid for worker in split.encoders.workers]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            slow = [group.create_task(encode("long", long)) for _ in range(2)]
            while not all(worker.load > 10**6 for worker in split.encoders.workers):
                await asyncio.sleep(0)
            short = [group.create_task(encode("short", f"short {i}")) for i in range(6)]
            await asyncio.sleep(0)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        assert len(short) == ended.count("short") == 6
        assert ended[0] == "short"  # there is a long one before it at either encoder
        assert slow[0].result() == slow[1].result()

    runner.run(work())


def test_what_a_template_refuses_and_what_never_ends(export, files, runner, monkeypatch):
    template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('it has to be yes') }}{% endif %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    monkeypatch.setattr(pool, "_ANSWER_TIMEOUT_S", 0.5)
    broken = TokenizerFiles(files.backend, {"default": template}, {}, "")

    async def work():
        stages = SplitStages(broken, encoders=2)
        await stages.start()
        try:
            with pytest.raises(TextError, match="it has to be yes") as refused:
                await stages.encode(["fine", Chat([{"role": "user", "content": "no"}])])
            assert refused.value.param == "messages"
            with pytest.raises(EngineError, match="3 processes ended with it: gave no answer"):
                await stages.encode([Chat([{"role": "user", "content": "yes"}])])
            assert await stages.encode(["fine"]) == await LocalStages(files).encode(["fine"])
            served, messages = deployment(export, files, stages), [{"role": "user", "content": "y"}]
            body = {"model": "tiny", "messages": messages}
            answer = await post(served, "chat/completions", body)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "engine"
            answer = await post(served, "chat/completions", body, **{"x-request-timeout": "0.2"})
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline"
        finally:
            await stages.close()

    runner.run(work())


def test_one_that_does_not_start_leaves_nothing(files, runner):
    async def work():
        stages = SplitStages(TokenizerFiles("no json", {}, {}, ""), encoders=2)
        with pytest.raises(SpotforgeError, match="exit code 1"):
            await stages.start()
        assert [w.pid for w in stages.encoders.workers + stages.decoders.workers] == [None] * 3

    runner.run(work())


def test_processes_die_with_the_gateway_and_have_no_torch(export):
    words = ["topology=split", "text.decoders=2", "engine.num_threads=1"]
    process = Process(export, *words)
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{process.url}/v1/completions", json=body, timeout=300)
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert "spotforge_text_restarts{" in httpx.get(f"{process.url}/metrics").text
    pids = programs.children(process.process.pid)
    stages = [p for p in pids if b"serving.text.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert (len(pids), len(stages)) == (4, 3)
    assert not any("libtorch" in Path(f"/proc/{p}/maps").read_text() for p in stages)
    os.kill(stages[0], signal.SIGSTOP)  # even one that cannot see the end of its input
    process.process.kill()
    process.process.wait(120)
    process.process.stdout.close()
    deadline_s = time.monotonic() + 120
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("topology", "counts", "said"),
    [
        ("local", {"encoders": 2}, "text.encoders=2: has no effect"),
        ("local", {"decoders": 1}, "text.decoders=1: has no effect"),
        ("split", {"decoders": 0}, "text.decoders=0"),
    ],
)
def test_settings_that_cannot_be(topology, counts, said):
    config = ServingConfig("x", topology=Topology[topology], text=TextConfig(**counts))
    with pytest.raises(ConfigError, match=said):
        check_settings(config)
