"""`python -m serving` as a user runs it."""

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
from tests.serving.conftest import Process, save_model, stream_lines


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


def terminate_under_streams(export, after_s=0.0):
    """A server that is told to stop while eight clients read; asserts that it cuts none off."""
    process = Process(export, "engine.num_threads=1", "engine.max_running=8")
    answers = []

    def read():
        body = {
            "model": "tiny",
            "prompt": "a",
            "max_tokens": 300,
            "stream": True,
            "ignore_eos": True,
        }
        url = f"{process.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=300) as answer:
            answers.append((answer.status_code, list(stream_lines(answer))))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    while "num_requests_running{" not in (text := httpx.get(f"{process.url}/metrics").text) or (
        " 8.0"
        not in next(x for x in text.splitlines() if x.startswith("spotforge_num_requests_running{"))
    ):
        time.sleep(0.01)
    time.sleep(after_s)
    engine_pid = process.engine_pid()
    process.process.send_signal(signal.SIGTERM)
    while httpx.get(f"{process.url}/readyz").status_code != 503:
        time.sleep(0.01)
    late = complete(process.url)
    assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
    for thread in threads:
        thread.join(120)
    assert process.process.wait(120) == 0
    process.process.stdout.close()
    for status, events in answers:
        assert status == 200 and events[-1] == "[DONE]"
        assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert len(answers) == 8
    assert is_gone(engine_pid)


def test_sigterm_lets_streams_end(export):
    terminate_under_streams(export)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_sigterms_cut_off_no_stream(export):
    for i in range(20):
        terminate_under_streams(export, after_s=i * 0.02)


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
    admin, statuses, versions, done = process.admin_url(), [], [], threading.Event()

    def ask():
        while not done.is_set():
            answer = complete(process.url, max_tokens=5)
            statuses.append(answer.status_code)
            versions.append(answer.headers.get("x-artifact-version"))

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
        first = versions[-1]
        swapped = httpx.post(swap, json={"artifact": "next"}, timeout=300).json()
        assert (swapped["what"], swapped["old"]) == ("swapped", first)
        asked = len(versions)
        while len(versions) < asked + 6:
            time.sleep(0.02)
        assert set(versions[-2:]) == {swapped["new"]}
        rollback = f"{admin}/admin/rollback"
        back = httpx.post(rollback, json={}, timeout=300).json()
        assert (back["what"], back["new"]) == ("rolled_back", first)
        again = httpx.post(rollback, json={}, timeout=300)
        assert again.status_code == 400 and again.json()["error"]["param"] == "model"
        canary = {"artifact": "next", "canary": 0.5}
        assert httpx.post(swap, json=canary, timeout=300).json()["what"] == "canary"
        while (status := httpx.get(f"{admin}/admin/status").json()["models"]["tiny"])["canary"]:
            time.sleep(0.05)
        assert status["history"][-1]["what"] == "promoted"
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
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
