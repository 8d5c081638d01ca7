"""What a model's author says of sampling is what a request gets that says nothing of it."""

import dataclasses
import json
import shutil

import httpx
import pytest

from core.errors import ConfigError
from serving.config import GenerationConfig, ServingConfig
from serving.deployment import check_defaults, sampling_defaults
from serving.engine import EngineInfo
from serving.sampling import SamplingParams, defaults_of
from tests.serving.conftest import Process

AUTHORS = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "do_sample": True,
    "eos_token_id": [1, 2],
}
PARAMS = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05)


def written(folder, content):
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def test_defaults_are_the_authors_or_neutral(tmp_path):
    assert defaults_of(tmp_path) == SamplingParams()
    written(tmp_path, AUTHORS)
    assert defaults_of(tmp_path) == PARAMS
    for source, wanted in (
        (GenerationConfig.auto, PARAMS),
        (GenerationConfig.vllm, SamplingParams()),
    ):
        config = ServingConfig("x", generation_config=source)
        assert sampling_defaults(tmp_path, config) == wanted
    nulls = {"temperature": None, "top_k": -1, "min_p": 0}
    assert defaults_of(written(tmp_path, nulls)) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "0.5"),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", True),
        ("top_k", 0.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", [1.1]),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"says {name}=") as error:
        defaults_of(written(tmp_path, {name: value}))
    assert error.value.key == "generation_config" and "\n" not in str(error.value)


def test_an_engine_that_lacks_a_setting_is_refused_not_ignored():
    able = EngineInfo("able", 9, 9, features=["top_k", "repetition_penalty"])
    check_defaults(PARAMS, able)
    check_defaults(SamplingParams(temperature=0.3, top_p=0.2), EngineInfo("plain", 9, 9))
    with pytest.raises(ConfigError, match="the model says top_k=20, which plain lacks"):
        check_defaults(PARAMS, EngineInfo("plain", 9, 9))


def test_requests_are_built_with_them_once(served):
    with served() as running:
        running.engine.info.features.extend(["top_k", "min_p", "repetition_penalty"])
        deployment = running.gateway.models["tiny"].champion
        deployment.defaults = PARAMS
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        own = {"temperature": 0, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1, "top_p": 1}
        for asked, wanted in (
            ({}, PARAMS),
            ({"temperature": None, "top_k": None}, PARAMS),
            ({"top_p": 0.5}, dataclasses.replace(PARAMS, top_p=0.5)),
            (own, SamplingParams(temperature=0, min_p=0.1)),
        ):
            answer = httpx.post(f"{running.url}/v1/completions", json=body | asked)
            assert answer.status_code == 200, answer.text
            request = running.engine.seen[-1]
            wanted = dataclasses.asdict(wanted)
            assert {name: getattr(request, name) for name in wanted} == wanted
        running.engine.info.features.remove("min_p")
        error = httpx.post(f"{running.url}/v1/completions", json=body | own).json()["error"]
        assert error["param"] == "min_p" and "fake 1" in error["message"]


@pytest.mark.long
def test_a_server_applies_the_authors_once_and_vllm_leaves_them_out(export, tmp_path):
    folder = shutil.copytree(export, tmp_path / "tiny")
    authors = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.4}
    written(folder, authors)
    neutral = {"temperature": 1, "top_p": 1, "repetition_penalty": 1}
    answers = {}
    for source in ("auto", "vllm"):
        words = ("engine.num_threads=1", f"generation_config={source}", f"cache={tmp_path}/cache")
        server = Process(folder, *words)
        try:
            for which, asked in (("silent", {}), ("authors", authors), ("neutral", neutral)):
                body = {"model": server.name, "prompt": "the cat", "seed": 3, "max_tokens": 24}
                found = httpx.post(f"{server.url}/v1/completions", json=body | asked | {"n": 4})
                answers[source, which] = [choice["text"] for choice in found.json()["choices"]]
        finally:
            server.stop()
    assert answers["auto", "silent"] == answers["auto", "authors"] == answers["vllm", "authors"]
    assert answers["vllm", "silent"] == answers["auto", "neutral"] == answers["vllm", "neutral"]
    assert answers["auto", "silent"] != answers["vllm", "silent"]
