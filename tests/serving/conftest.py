"""A tiny model that is served, and an engine that needs no model."""

import asyncio
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
import uvicorn
from httpx._config import DEFAULT_TIMEOUT_CONFIG

from serving.artifact import resolve
from serving.config import ServingConfig
from serving.deployment import Deployment
from serving.engine import EngineInfo, EngineStats, TokenChunk, TokenLogprob
from serving.gateway.app import make_app
from serving.gateway.gateway import Gateway
from serving.models import Model
from serving.telemetry import Telemetry
from serving.text.pipeline import LocalStages
from serving.text.tokenizer import load
from tests import programs, small_model

# httpx gives up after 5 s, which a busy machine may need; its clients share this object.
for _phase in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, _phase, 120.0)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


TEXTS = ["the cat sat on a mat\n", "dogs ran far, naïve ☕ and ate fish\n"]


def save_model(folder, seed=0):
    return small_model.save_model(folder, TEXTS, seed=seed, gain=6.0, chat_template=TEMPLATE)


@pytest.fixture(scope="session", autouse=True)
def no_certificates(tmp_path_factory):
    """Each client would read all of the machine's, for 20 ms; here nobody speaks TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("no-certificates")))
        yield


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_model(folder)
    return folder


class FakeEngine:
    """Says the tokens of `text`, over and over; a token each `token_s` seconds."""

    def __init__(self, tokens, token_s=0.0, max_running=4):
        self.tokens, self.token_s = tokens, token_s
        self.info = EngineInfo(
            "fake 1", 512, max_running, features=["embeddings", "logprobs_when_sampling"]
        )
        self.is_ready = True
        self.running, self.cancelled, self.seen = 0, 0, []
        self.fails = None
        self.others = []  # alternatives to each token, less likely than it

    async def start(self):
        return self.info

    async def submit(self, request):
        self.seen.append(request)
        self.running += 1
        try:
            for i in range(request.max_tokens):
                await asyncio.sleep(self.token_s)
                if self.fails is not None:
                    raise self.fails
                token = self.tokens[i % len(self.tokens)]
                told = None
                if request.logprobs is not None:
                    top = [(token, -0.5), *((other, -2.0) for other in self.others)]
                    told = [TokenLogprob(-0.5, top[: request.logprobs])]
                is_last = i + 1 == request.max_tokens
                yield TokenChunk([token], told, "length" if is_last else None)
                if is_last:
                    return
        except GeneratorExit:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def embed(self, id, inputs, adapter=None):
        return [[float(len(ids)), 0.0] for ids in inputs]

    def stats(self):
        return EngineStats(running=self.running)

    async def close(self):
        self.is_ready = False


class Served:
    """A gateway in a thread, over a fake engine."""

    def __init__(self, export, cache, text="the cat sat on a mat\n", keys=None, **settings):
        self.config = ServingConfig(artifact=str(export))
        engine_settings = {k: settings.pop(k) for k in ("token_s", "max_running") if k in settings}
        for key, value in settings.items():
            group, name = key.split("__")
            setattr(getattr(self.config, group), name, value)
        artifact = resolve(str(export))
        files = load(artifact, cache)
        tokens = files.tokenizer().encode(text).ids
        self.engine = FakeEngine(tokens, **engine_settings)
        self.config.engine.max_running = self.engine.info.max_running
        self.files, self.artifact = files, artifact
        self.keys = keys

    def __enter__(self):
        self.gateway = Gateway(self.config, self.keys, Telemetry(self.config.log))
        deployment = Deployment(self.artifact, self.engine, LocalStages(self.files))
        self.gateway.models["tiny"] = Model("tiny", deployment, 1)
        self.app = make_app(self.gateway)
        config = uvicorn.Config(
            self.app, port=0, log_config=None, lifespan="off", http="httptools", loop="uvloop"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server ended before it listened"
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(120)
        assert not self.thread.is_alive(), "the server does not end"


@pytest.fixture(scope="session")
def served(export, tmp_path_factory):
    """Parts for a gateway: `with served(token_s=0.1) as s:`."""
    cache = tmp_path_factory.mktemp("serving-cache")
    return lambda **settings: Served(export, cache, **settings)


class Process:
    """`python -m serving`, as a user starts it."""

    def __init__(self, folder, *words):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving", f"artifact={folder}", "port=0", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "SPOTFORGE_OPENVINO_PYTHON": ""},
        )
        ready, _, _ = select.select([self.process.stdout], [], [], 300)
        line = self.process.stdout.readline() if ready else ""
        if " at http" not in line:
            self.process.kill()
            raise RuntimeError(f"it did not start: {line!r}, exit code {self.process.wait()}")
        self.name, _, rest = line.partition(" ")
        self.url = rest.strip().rpartition(" at ")[2].removesuffix("/v1")

    def admin_url(self):
        """It is the second line."""
        return self.process.stdout.readline().split()[-1]

    def engine_pid(self):
        """Of the only child."""
        return programs.children(self.process.pid)[0]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(300)
        finally:
            self.process.stdout.close()


@pytest.fixture(scope="session")
def server(export):
    """One server with the transformers engine, for all tests that leave it as it was."""
    process = Process(export, "engine.num_threads=1", "admin_port=0", "engine.max_running=8")
    yield process
    process.stop()


def stream_lines(response):
    """The events of a stream of httpx, parsed; `[DONE]` as it is."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


async def until(condition, what, within_s=300.0):
    """Waits in an event loop; what is waited for has to last, or a late look would miss it."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"not in {within_s:g} s: {what}"
        await asyncio.sleep(0.005)


async def caught_at(running, ask, num_tokens, number=signal.SIGKILL):
    """Sends a signal to an engine in the middle of all requests that `ask(prefix)` makes.

    A test that is slow to look may find them done; it asks again then. Returns the task that waits
    for their answers.
    """
    for attempt in itertools.count():
        task = asyncio.create_task(ask(f"caught-{number}-{attempt}-"))
        while not task.done():
            live = list(running._live.values())
            if live and all(len(request.tokens) >= num_tokens for request in live):
                os.kill(running.pid, number)
                return task
            await asyncio.sleep(0.001)
        await task
