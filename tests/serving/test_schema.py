"""Answers that are held to a JSON schema, by the transformers engine."""

import asyncio
import json
import re
from functools import partial
from queue import SimpleQueue

import httpx
import jsonschema_rs
import numpy as np
import pytest
from transformers import AutoTokenizer

from serving.engine import EngineRefused, TokenRequest
from serving.engines.grammars import Grammars
from serving.text.tools import call_schema
from tests.serving.conftest import caught_at, stream_lines
from tests.serving.test_engine import PROMPT, tokens_of, with_engine

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog", "naïve ☕"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 1},
    },
    "required": ["kind", "legs", "names"],
    "additionalProperties": False,
}
HELD = {"schema": SCHEMA, "ignore_eos": False, "max_tokens": 240}


def test_texts_satisfy_their_schema_and_the_rest_of_the_batch_goes_on(export):
    async def work(running):
        assert "json_schema" in running.info.features
        free, _, _ = await tokens_of(running, "free", seed=5)
        own, wanted, _ = await tokens_of(running, "own", seed=5, max_tokens=1, logprobs=3)
        held = [
            tokens_of(running, f"h{i}", seed=i, logprobs=3, top_p=p, temperature=t, **HELD)
            for i, (t, p) in enumerate([(1, 1), (1, 1), (1, 0.5), (0, 1)])
        ]
        *held, again = await asyncio.gather(*held, tokens_of(running, "again", seed=5))
        return held, again[0], free, wanted

    held, again, free, wanted = with_engine(export, work)
    assert again == free, "the grammar of others decides what is drawn"
    tokenizer = AutoTokenizer.from_pretrained(export)
    for found, logprobs, reason in held:
        assert reason == "stop"
        jsonschema_rs.validate(SCHEMA, json.loads(tokenizer.decode(found)))
        assert len(logprobs) == len(found)
        # Of the model's own distribution: what the grammar forbids is among the likeliest.
        assert logprobs[0].top == [(t, pytest.approx(x, abs=1e-3)) for t, x in wanted[0].top]
        assert logprobs[0].logprob < logprobs[0].top[-1][1]
    assert len({tuple(found) for found, _, _ in held}) == len(held)


@pytest.mark.parametrize("schema", [{"type": "array", "items": {"enum": [1]}}, SCHEMA])
def test_a_model_that_likes_white_space_still_comes_to_an_end(export, schema):
    tokenizer, told = AutoTokenizer.from_pretrained(export), SimpleQueue()
    grammars = Grammars(tokenizer, 320, [0], lambda name, found: told.put(found))
    grammars.compile("x", schema)
    matcher, tokens = told.get(timeout=300), []
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    spaces = [i for i, text in enumerate(texts) if text and not text.strip()]
    while not matcher.is_stopped():
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        ends = [i for i in allowed if texts[i] in ("]", "}", '"')]
        tokens.append(([i for i in spaces if i in allowed] + ends + allowed)[0])
        matcher.consume_tokens(tokens[-1:])
        assert len(tokens) < 250
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    json.loads(text)
    assert max(map(len, re.findall(r"\s+", text))) <= 10


def test_a_text_goes_on_within_its_grammar_when_its_engine_is_lost(export):
    schema = {"type": "string", "pattern": "^([a-c]{3}[0-9]){30}$"}
    settings = {"schema": schema, "ignore_eos": False, "max_tokens": 200, "seed": 3}

    async def work(running):
        wanted, _, reason = await tokens_of(running, "w", **settings)
        assert reason == "stop" and len(wanted) > 60
        again = partial(tokens_of, running, **settings)
        found, _, reason = await (await caught_at(running, again, num_tokens=5))
        assert running.stats().restarts == 1
        assert (found, reason) == (wanted, "stop")

    with_engine(export, work)


# What a hostile client may send, and what it costs: a refusal, or a text.
ODD = {
    "nonsense": {"type": "nonsense"},
    "lookahead": {"pattern": "(?=a)b", "type": "string"},
    "remote": {"$ref": "https://example.com/schema"},
    "itself": {"$ref": "#"},
    "unsatisfiable": {"type": "integer", "minimum": 1, "maximum": 0},
    "surrogate": {"const": "\ud800"},
    "properties": {"properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    "chain": {
        "$defs": {f"{i}": {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1600)}
        | {"1600": {"type": "string"}},
        "$ref": "#/$defs/0",
    },
    "regex": {"type": "string", "pattern": "^(.*a.*b.*c.*d){20}(x|y)+.{1000}(.{1,99}z){1,99}$"},
    "many": {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(4)]} for i in range(8)]},
}


def test_no_schema_takes_the_engine_down(export):
    async def work(running):
        pid = running.pid
        stream = running.submit(TokenRequest("free", PROMPT, 250, ignore_eos=True))
        await anext(stream)

        async def fate(name, schema):
            try:
                _, _, reason = await tokens_of(
                    running, name, schema=schema, ignore_eos=False, max_tokens=30
                )
            except EngineRefused:
                return "refused"
            return reason

        fates = {name: await fate(name, schema) for name, schema in ODD.items()}
        assert [chunk async for chunk in stream][-1].finish_reason == "length"
        assert running.pid == pid
        return fates

    fates = with_engine(export, work, step_timeout_s=60.0)
    certain = ("nonsense", "lookahead", "remote", "itself", "unsatisfiable", "surrogate", "many")
    assert {name for name, fate in fates.items() if fate == "refused"} == set(certain)


def body(schema, **more):
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {"model": "tiny", "prompt": "x", "response_format": named, "max_tokens": 400} | more


def test_over_http(server):
    with httpx.Client(base_url=server.url, timeout=300) as client:
        answer = client.post("/v1/completions", json=body(SCHEMA, n=3)).json()
        for choice in answer["choices"]:
            jsonschema_rs.validate(SCHEMA, json.loads(choice["text"]))
            assert choice["finish_reason"] == "stop"
        with client.stream("POST", "/v1/completions", json=body(SCHEMA, stream=True)) as stream:
            parts = [line for line in stream_lines(stream) if line != "[DONE]"]
        text = "".join(part["choices"][0]["text"] for part in parts)
        jsonschema_rs.validate(SCHEMA, json.loads(text))
        chat = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_object"},
            "max_tokens": 250,
            "seed": 1,
        }
        choice = client.post("/v1/chat/completions", json=chat).json()["choices"][0]
        assert choice["message"]["content"].startswith("{")


FUNCTIONS = {
    "pin": {  # as pydantic writes them
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"A": {"enum": [1, 2]}},
    },
    "nest": {"anyOf": [{"enum": [7]}, {"type": "array", "items": {"$ref": "#"}}]},
    "free": None,
}


def test_the_schema_of_a_call():
    schema = call_schema(FUNCTIONS)
    for name, arguments, is_valid in (
        ("pin", {"a": 1}, True),
        ("pin", {"a": 3}, False),
        ("pin", 7, False),
        ("nest", [[7], 7], True),
        ("nest", [[8]], False),
        ("free", {"b": 5}, True),
        ("free", 5, False),
        ("other", {}, False),
    ):
        call = {"name": name, "arguments": arguments}
        assert jsonschema_rs.is_valid(schema, call) is is_valid, call
    assert jsonschema_rs.is_valid(call_schema({"pin": FUNCTIONS["pin"]}), {"name": "pin"}) is False


def a_call(choice, seed, **more):
    messages = [{"role": "user", "content": "x"}]
    told = {"model": "tiny", "messages": messages, "seed": seed, "max_tokens": 150}
    schemas = {"pin": FUNCTIONS["pin"], "p": {"enum": [7]}}
    functions = [{"name": name, "parameters": schema} for name, schema in schemas.items()]
    tools = [{"type": "function", "function": function} for function in functions]
    return {**told, "tools": tools, "tool_choice": choice, **more}


def test_a_tool_that_has_to_be_called_is_called(server):
    named = {"type": "function", "function": {"name": "pin"}}
    seen = set()
    with httpx.Client(base_url=server.url, timeout=300) as client:
        for seed in range(6):
            for choice in (named, "required"):
                told = client.post("/v1/chat/completions", json=a_call(choice, seed)).json()
                [told] = told["choices"]
                [call] = told["message"]["tool_calls"]
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                assert told["finish_reason"] == "tool_calls" and told["message"]["content"] is None
                assert json.loads(arguments) in ([{"a": 1}, {"a": 2}] if name == "pin" else [7])
                assert choice == "required" or name == "pin"
                seen.add(name)
        assert seen == {"pin", "p"}
        streamed = a_call(named, 0, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=streamed) as stream:
            parts = [line["choices"][0] for line in stream_lines(stream) if line != "[DONE]"]
        [[call]] = [p["delta"]["tool_calls"] for p in parts if "tool_calls" in p["delta"]]
        assert json.loads(call["function"]["arguments"])["a"] in (1, 2)
        assert parts[-1]["finish_reason"] == "tool_calls"
        cut = client.post("/v1/chat/completions", json=a_call(named, 0, max_tokens=5)).json()
        assert cut["choices"][0]["finish_reason"] == "length"
        assert cut["choices"][0]["message"]["content"].startswith("{")
        # Agent frameworks send both: the call is made.
        both = a_call(named, 0, response_format={"type": "json_object"})
        told = client.post("/v1/chat/completions", json=both).json()["choices"][0]
        assert told["message"]["tool_calls"][0]["function"]["name"] == "pin"


def test_a_refused_schema_is_the_clients_mistake_and_nobody_elses(server):
    pid = server.engine_pid()
    free = {"model": "tiny", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=server.url, timeout=300) as client:
        with client.stream("POST", "/v1/completions", json=free) as stream:
            lines = stream_lines(stream)
            next(lines)
            for more in ({}, {"stream": True}):
                refused = client.post("/v1/completions", json=body(ODD["lookahead"], **more))
                error = refused.json()["error"]
                assert (refused.status_code, error["param"]) == (400, "response_format")
                assert "look-ahead" in error["message"]
            assert list(lines)[-1] == "[DONE]"
        assert 'reason="refused"} 2.0' in client.get("/metrics").text
    assert server.engine_pid() == pid


def nested(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("levels", [150, 400, 900, 50_000])
def test_a_tool_nested_without_end_is_refused(server, levels):
    nested = '{"items": ' * levels + "{}" + "}" * levels
    tool = {"type": "function", "function": {"name": "f", "parameters": "NESTED"}}
    for choice in ("auto", "required"):
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
        content = json.dumps(asked | {"tools": [tool], "tool_choice": choice})
        content = content.replace('"NESTED"', nested)
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    ("schema", "more", "says"),
    [
        (nested(120), {}, "at most 100 levels"),
        ({"enum": ["x" * 70_000]}, {}, "at most 65536 bytes"),
        ({}, {"ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_the_gateway_refuses_at_once(server, schema, more, says):
    answer = httpx.post(f"{server.url}/v1/completions", json=body(schema, **more))
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]
