"""`python -m serving` as a user runs it."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from core.errors import SpotforgeError
from serving.config import RolloutConfig
from serving.deployment import Deployment
from serving.gateway.admin import add_admin
from serving.gateway.app import add_error_handlers
from serving.models import Outcomes
from serving.rollout import Rollout, judge
from serving.server import serve
from serving.text.pipeline import LocalStages
from tests.serving.conftest import FakeEngine, Process, save_model, stream_lines, until


def complete(url, **fields):
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 20, "ignore_eos": True, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=300)


def test_it_serves(server):
    assert httpx.get(f"{server.url}/readyz").json()["ready"] is True
    version = httpx.get(f"{server.url}/version").json()
    assert version["models"]["tiny"]["engine"].startswith("transformers")
    one, two = complete(server.url, seed=3).json(), complete(server.url, seed=3).json()
    assert one["choices"] == two["choices"]
    assert one["usage"]["completion_tokens"] == 20
    long = complete(server.url, prompt="x" * 6000)
    assert long.status_code == 400 and "512" in long.json()["error"]["message"]
    assert complete(server.url, prompt=[10**6]).status_code == 400
    assert httpx.get(f"{server.url}/readyz").json()["ready"] is True


def test_the_gateway_imports_no_torch():
    code = "import sys, serving.server; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


class HeldEngine(FakeEngine):
    """Says two tokens of each request, and the others once `is_open` is set."""

    def __init__(self, tokens):
        super().__init__(tokens)
        self.is_open = asyncio.Event()

    async def submit(self, request):
        said = 0
        async for chunk in super().submit(request):
            yield chunk
            said += 1
            if said == 2:
                await self.is_open.wait()


def test_it_refuses_what_comes_while_what_runs_ends(served, monkeypatch, capsys):
    parts = served()
    engine = HeldEngine(parts.engine.tokens)

    async def start(artifact, *_):
        return Deployment(artifact, engine, LocalStages(parts.files))

    async def stream(client):
        body = {"model": "tiny", "prompt": "a", "max_tokens": 40, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            return answer.status_code, [line async for line in answer.aiter_lines() if line]

    async def work():
        serving, said = asyncio.create_task(serve(parts.config)), ""
        while " at http" not in said:
            await asyncio.sleep(0.01)
            assert not serving.done()
            said += capsys.readouterr().out
        url = said.split()[-1].removesuffix("/v1")
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            streams = [asyncio.create_task(stream(client)) for _ in range(4)]
            await until(lambda: len(engine.seen) == 4, "four requests run")
            os.kill(os.getpid(), signal.SIGTERM)
            # None of the four can end before `is_open`, so neither can the server.
            while (await client.get("/readyz")).status_code != 503:
                await asyncio.sleep(0.01)
            body = {"model": "tiny", "prompt": "late"}
            late = await client.post("/v1/completions", json=body)
            assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
            for _ in range(30):  # what does not wait for the four would close the port by now
                assert (await client.get("/readyz")).status_code == 503
                await asyncio.sleep(0.01)
            engine.is_open.set()
            for status, lines in await asyncio.gather(*streams):
                assert status == 200 and lines[-1] == "data: [DONE]"
                assert '"finish_reason":"length"' in lines[-2]
            await serving
        assert len(engine.seen) == 4 and not engine.is_ready

    parts.config.port, parts.config.model_name = 0, "tiny"
    monkeypatch.setattr(Deployment, "start", start)
    asyncio.run(work())


class Readers:
    """Eight clients that ask again and again until the server says that it drains, or is gone.

    So there are always streams to cut off, whenever it is told to stop.

    Attributes:
        whole: Ids of streams that ended as they should.
        across: Those of them that began before the server was told and ended after.
        failures: What went wrong, a line each.
    """

    BODY = {"model": "tiny", "prompt": "a", "max_tokens": 300, "stream": True, "ignore_eos": True}

    def __init__(self, url):
        self.url = f"{url}/v1/completions"
        self.whole, self.across, self.failures = [], [], []
        self.is_told = threading.Event()
        self._begun = [threading.Event() for _ in range(8)]
        self._threads = [threading.Thread(target=self._read, args=(e,)) for e in self._begun]
        for thread in self._threads:
            thread.start()

    def wait_until_all_read(self):
        """Waits until each has had the beginning of an answer, which stays true."""
        for begun in self._begun:
            assert begun.wait(300), f"no stream began: {self.failures}"

    def join(self):
        for thread in self._threads:
            thread.join(300)
            assert not thread.is_alive(), f"a reader still reads: {self.failures}"

    def _read(self, begun):
        try:
            while self._read_one(begun):
                pass
        except Exception as e:
            self.failures.append(f"{type(e).__name__}: {e}")
        finally:
            begun.set()

    def _read_one(self, begun):
        """Reads a stream to its end; returns whether another may be asked for."""
        with contextlib.ExitStack() as held:
            try:
                answer = held.enter_context(
                    httpx.stream("POST", self.url, json=self.BODY, timeout=300)
                )
            except httpx.TransportError:
                if self.is_told.is_set():
                    return False  # the port is closed: nothing had begun
                raise
            if answer.status_code == 503 and self.is_told.is_set():
                assert json.loads(answer.read())["error"]["code"] == "draining"
                return False
            assert answer.status_code == 200
            events = stream_lines(answer)
            next(events)
            was_told = self.is_told.is_set()
            begun.set()
            *_, last, done = events
            assert done == "[DONE]" and last["choices"][0]["finish_reason"] == "length"
            self.whole.append(last["id"])
            if self.is_told.is_set() and not was_told:
                self.across.append(last["id"])
        return True


def terminate_under_streams(export, after_s=0.0):
    """Stops a server while eight clients read; asserts that it cuts none off.

    Returns:
        Number of streams that it was in the middle of.
    """
    process = Process(export, "engine.num_threads=1", "engine.max_running=8")
    readers = Readers(process.url)
    try:
        readers.wait_until_all_read()
        time.sleep(after_s)
        engine_pid = process.engine_pid()
        readers.is_told.set()
        assert process.stop() == 0
        readers.join()
    finally:
        process.process.kill()
        process.process.wait()
        readers.is_told.set()
    assert readers.failures == [] and len(set(readers.whole)) >= 8
    assert is_gone(engine_pid)
    return len(readers.across)


def test_sigterm_lets_streams_end(export):
    # On a machine that lets the readers wait, all streams may have ended just before the signal.
    assert any(terminate_under_streams(export) for _ in range(5))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_sigterms_cut_off_no_stream(export):
    assert sum(terminate_under_streams(export, after_s=i * 0.02) for i in range(20)) > 0


def test_the_engine_dies_with_the_gateway(export):
    process = Process(export)
    engine_pid = process.engine_pid()
    process.process.kill()
    process.process.wait(120)
    process.process.stdout.close()
    for _ in range(6000):
        if is_gone(engine_pid):
            return
        time.sleep(0.02)
    raise AssertionError("the engine is still there")


@pytest.mark.long
def test_swap_without_a_failed_request(export, tmp_path):
    save_model(tmp_path / "next", seed=1)
    for name in ("damaged", "narrow"):
        save_model(tmp_path / name, seed=2)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
    path = tmp_path / "narrow" / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 96', '"intermediate_size": 48'))
    words = ["engine.num_threads=1", "admin_port=0", f"artifact_root={tmp_path}"]
    process = Process(export, *words, "rollout.canary_requests=5", "rollout.canary_max_slowdown=50")
    admin, statuses, done = process.admin_url(), [], threading.Event()
    since = {"start": []}  # versions that answered what was asked since something happened
    version = lambda answer: answer.headers.get("x-artifact-version")  # noqa: E731

    def ask():
        while not done.is_set():
            versions = list(since.values())[-1]
            answer = complete(process.url, max_tokens=5)
            statuses.append(answer.status_code)
            versions.append(version(answer))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        swap = f"{admin}/admin/swap"
        for name, rule in (
            ("damaged", "is cut off"),
            ("narrow", "down_proj.weight is (64, 96), but (64, 48)"),
        ):
            refused = httpx.post(swap, json={"artifact": name}, timeout=300)
            assert refused.status_code == 400 and rule in refused.json()["error"]["message"]
        assert httpx.post(swap, json={"artifact": "../served"}).status_code == 400
        first = version(complete(process.url, max_tokens=1))
        swapped = httpx.post(swap, json={"artifact": "next"}, timeout=300).json()
        assert (swapped["what"], swapped["old"]) == ("swapped", first)
        new = since["swap"] = []
        deadline_s = time.monotonic() + 300
        while len(new) < 6:
            assert time.monotonic() < deadline_s, "nobody is answered"
            time.sleep(0.02)
        assert set(new) == {swapped["new"]}
        rollback = f"{admin}/admin/rollback"
        back = httpx.post(rollback, json={}, timeout=300).json()
        assert (back["what"], back["new"]) == ("rolled_back", first)
        again = httpx.post(rollback, json={}, timeout=300)
        assert again.status_code == 400 and again.json()["error"]["param"] == "model"
        canary = {"artifact": "next", "canary": 0.5}
        assert httpx.post(swap, json=canary, timeout=300).json()["what"] == "canary"
        deadline_s = time.monotonic() + 300
        while (status := httpx.get(f"{admin}/admin/status").json()["models"]["tiny"])["canary"]:
            assert time.monotonic() < deadline_s, "the trial does not end"
            time.sleep(0.05)
        assert status["history"][-1]["what"] == "promoted"
    finally:
        done.set()
        for thread in threads:
            thread.join(300)
        assert process.stop() == 0
    assert set(statuses) == {200}


def test_what_does_not_start_does_not_take_over(served, export, tmp_path, monkeypatch):
    async def start(*_):
        raise SpotforgeError("its engine ended with 1")

    monkeypatch.setattr(Deployment, "start", start)
    with served() as s:
        champion = s.gateway.models["tiny"].champion
        rollout = Rollout(
            s.gateway.models["tiny"], s.config, tmp_path, export.parent, lambda _: None
        )
        app = FastAPI()
        add_error_handlers(app)
        add_admin(app, s.gateway, {"tiny": rollout}, lambda: None)
        for words in ({}, {"canary": 0.5}):
            answer = TestClient(app).post("/admin/swap", json={"artifact": export.name, **words})
            assert answer.status_code == 409
            assert answer.json()["error"]["message"] == "not swapped: its engine ended with 1"
        assert [event.what for event in rollout.history] == ["refused", "refused"]
        model = s.gateway.models["tiny"]
        assert model.champion is champion and model.canary is None


@pytest.mark.parametrize(
    ("failed", "token_s", "verdict"),
    [(0, 0.1, True), (1, 0.1, True), (5, 0.1, False), (0, 0.2, False)],
)
def test_how_a_canary_is_judged(failed, token_s, verdict):
    config = RolloutConfig(canary_requests=50)
    champion = Outcomes(500, 2, [0.5] * 500, [0.1] * 500)
    canary = Outcomes(50 - failed, failed, [0.5] * (50 - failed), [token_s] * (50 - failed))
    is_good, why = judge(champion, canary, config)
    assert is_good is verdict, why
    assert judge(champion, Outcomes(10, 0, [0.5] * 10, [0.1] * 10), config) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["artifact=/no/such"], "there is no such folder"),
        ([], "artifact=???: must be given"),
        (["artifact=x", "--foo"], "option=--foo: there is no such option"),
        (["--cfg", "nope"], "--cfg=nope: must be one of job"),
        (["artifact=x", "admission.max_queued_requests=-1"], "admission.max_queued_requests=-1"),
        (["artifact=x", "engine.max_running=0"], "engine.max_running=0"),
        (["artifact=x", "no_such_key=1"], "no_such_key"),
        (["artifact=x", "port=99999"], "port=99999"),
        (["artifact=x", "admin_host=0.0.0.0"], "admin_host=0.0.0.0"),
        (["artifact=x", "log.text=true"], "log.text=True"),
        (["artifact=x", "batches.max_lines=5"], "batches.max_lines=5: has no effect"),
        (["artifact=x", "artifact_root=y"], "artifact_root=y: has no effect"),
        (["artifact=x", "model_name=''"], "model_name='': must"),
        (["artifact=x", "rollout.canary_max_error_rate=5"], "rollout.canary_max_error_rate=5"),
        (["key", "make"], "key=make: "),
        (["key", "list", "keys=a", "keys=b"], "keys=b: "),
        (["key", "create", "a", "admin=true", "admin=false"], "admin=false: "),
    ],
)
def test_what_is_refused(words, said):
    done = subprocess.run(
        [sys.executable, "-m", "serving", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_key_commands(tmp_path):
    def key(*words):
        command = [sys.executable, "-m", "serving", "key", *words, f"keys={tmp_path / 'k.json'}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    secret = key("create", "alice", "requests_per_minute=60").stdout.strip()
    assert secret.startswith("sf-")
    assert "alice" in key("list").stdout and secret not in key("list").stdout
    assert key("create", "alice").returncode == 2
    assert key("revoke", "alice").returncode == 0
    assert json.loads((tmp_path / "k.json").read_text()) == []


def test_hosts_and_caches_that_cannot_be(export):
    for words, said in (
        (["host=192.0.2.1"], "host=192.0.2.1: "),
        (["cache=/proc/nothing"], "cache=/proc/nothing: "),
        (["engine.kv_cache_mb=100000000"], "engine.kv_cache_mb=100000000: its KV cache takes "),
        (["engine.max_context=1"], "engine.max_context=1: must"),
        (["engine.max_running=1000000000"], "engine.max_running=1000000000: its KV cache takes "),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "serving", f"artifact={export}", "port=0", *words],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2
        assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
