"""OpenAI's own client against the gateway, and what the gateway answers to what is wrong."""

import json
import time

import httpx
import pytest
from openai import (
    APIError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OpenAI,
    RateLimitError,
)

from serving.engine import EngineError, EngineFailed
from serving.keys import Keys, create
from tests.serving.conftest import stream_lines

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def a_call(arguments):
    """A message with a call."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.fixture(scope="module")
def fast(served):
    with served() as running:
        yield running


@pytest.fixture
def client(fast):
    with OpenAI(base_url=f"{fast.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_chat(client, fast):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6)
    assert answer.choices[0].message.content == fast.files.tokenizer().decode(
        fast.engine.tokens[:6]
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    prompt = fast.engine.seen[-1].prompt
    assert fast.files.tokenizer().decode(prompt) == "<user>hello\n<assistant>"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.system_fingerprint == f"fp_{fast.artifact.version}"


def test_a_stream_says_the_same(client):
    words = dict(model="tiny", messages=HELLO, max_tokens=9)
    whole = client.chat.completions.create(**words).choices[0].message.content
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**words, stream=True, stream_options=options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 9
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_choices_and_prompts(client, fast):
    answer = client.completions.create(model="tiny", prompt=["a", "b c"], n=2, max_tokens=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 12
    assert [request.seed for request in fast.engine.seen[-4:]] == [7, 8, 9, 10]


def test_a_stop_string_is_left_out_and_ends_the_engines_work(client, fast):
    before = fast.engine.cancelled
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=50, stop=["sat on"])
    assert answer.choices[0].text == "the cat "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 50
    assert fast.engine.cancelled == before + 1


def test_log_probabilities(client):
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=3, logprobs=1)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.token_logprobs == [-0.5] * 3
    assert found.text_offset == [0, len(found.tokens[0]), len("".join(found.tokens[:2]))]
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=1
    )
    content = answer.choices[0].logprobs.content
    assert [len(token.top_logprobs) for token in content] == [1, 1]
    assert bytes(content[0].bytes).decode() == content[0].token


def test_the_sampled_token_is_among_the_top_and_none_is_merged(fast, monkeypatch):
    tokens = fast.files.tokenizer().encode("a🦊 b").ids
    monkeypatch.setattr(fast.engine, "tokens", tokens)
    monkeypatch.setattr(fast.engine, "others", [0, tokens[1], *range(8, 12)])  # single bytes
    size = len(tokens)
    body = {"model": "tiny", "prompt": "x", "max_tokens": size, "logprobs": 0}
    url = f"{fast.url}/v1/completions"
    [choice] = httpx.post(url, json=body).json()["choices"]
    found = choice["logprobs"]
    assert [list(top) for top in found["top_logprobs"]] == [[x] for x in found["tokens"]]
    assert found["text_offset"][-1] == len(choice["text"]) - len(found["tokens"][-1])
    [choice] = httpx.post(url, json=body | {"logprobs": 6}).json()["choices"]
    for token, top in zip(found["tokens"], choice["logprobs"]["top_logprobs"], strict=True):
        assert top[token] == -0.5 and len(top) in (6, 7)
    chat = {"model": "tiny", "messages": HELLO, "max_tokens": size, "logprobs": True}
    url = f"{fast.url}/v1/chat/completions"
    [choice] = httpx.post(url, json=chat).json()["choices"]
    told = [byte for token in choice["logprobs"]["content"] for byte in token["bytes"]]
    assert bytes(told).decode() == choice["message"]["content"] == "a🦊 b"
    # No token of a stop string, even where it came before one knew that it was one.
    chat |= {"stop": " b", "stream": True}
    with httpx.stream("POST", url, json=chat) as stream:
        parts = [line["choices"][0] for line in stream_lines(stream) if line != "[DONE]"]
    parts = [part["logprobs"]["content"] for part in parts if part["logprobs"]]
    told = [byte for part in parts for token in part for byte in token["bytes"]]
    assert bytes(told).decode() == "a🦊"


def test_embeddings_as_numbers_and_as_bytes(client):
    whole = client.embeddings.create(model="tiny", input=["a", "b c"], encoding_format="float")
    packed = client.embeddings.create(model="tiny", input=["a", "b c"])  # base64 by default
    assert [e.embedding for e in whole.data] == [e.embedding for e in packed.data]
    assert whole.usage.prompt_tokens == sum(int(e.embedding[0]) for e in whole.data)


def test_models(client, fast):
    [model] = client.models.list().data
    assert model.id == "tiny" and model.artifact == fast.artifact.digest
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(NotFoundError, match="there is tiny"):
        client.models.retrieve("large")


def test_tool_calls(served):
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Pune"}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    with served(text=f"well {call}") as running:
        with OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
            size = len(running.engine.tokens)
            words = dict(model="tiny", messages=HELLO, tools=tools, max_tokens=size)
            choice = client.chat.completions.create(**words).choices[0]
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "well "
            [found] = choice.message.tool_calls
            assert json.loads(found.function.arguments) == {"city": "Pune"}
            chunks = list(client.chat.completions.create(**words, stream=True))
            calls = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
            assert calls[0][0].function.name == "weather"
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            assert text == "well "


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"max_tokens": 1000}, "max_tokens", "has 512"),
        ({"max_tokens": None, "max_completion_tokens": 700}, "max_completion_tokens", "has 512"),
        ({"messages": [{"role": "user", "content": "a" * 600}]}, "messages", "the prompt has"),
        ({"extra_body": {"top_k": 5}}, "top_k", "fake 1"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "fake 1"),
        ({"extra_body": {"store": True}}, "store", "is not supported; leave it out"),
        ({"messages": [a_call("{")]}, "messages.0.tool_calls.0.function", "JSON"),
        ({"messages": [a_call("[" * 99_999)]}, "messages.0.tool_calls.0.function", "JSON"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 100}, "n", "more than the 4 that run at once"),
        ({"messages": []}, "messages", "messages must have at least 1 items"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "is not supported; leave it out"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported; leave it out"),
        ({"extra_body": {"no_such_key": 1}}, "no_such_key", "is not supported; leave it out"),
        ({"stop": [5]}, "stop", "stop must be a text, or up to 4"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "must be a text"),
        ({"tool_choice": "required"}, "tool_choice", "one of tools: none"),
        ({"tools": [TOOL], "tool_choice": {**TOOL, "function": {"name": "g"}}}, "tool_choice", "f"),
        ({"tools": [TOOL], "tool_choice": TOOL}, "tool_choice", "schema"),
        ({"extra_headers": {"x-priority": "high"}}, "x-priority", "one of interactive, batch"),
        ({"response_format": {"type": "json_object"}}, "response_format", "schema"),
    ],
)
def test_what_cannot_be_is_refused(client, change, param, message):
    words = {"model": "tiny", "messages": HELLO, "max_tokens": 4, **change}
    with pytest.raises(BadRequestError, match=message) as caught:
        client.chat.completions.create(**words)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{bad",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": 1e400}',
        b'{"model": "tiny", "prompt": {"a": 1}}',
        b'{"model": "tiny", "prompt": []}',
        b'{"model": "tiny", "prompt": [-1]}',
        b'{"model": "tiny", "prompt": [[]]}',
        b'{"model": "tiny", "prompt": ""}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "seed": 99999999999999999999999}',
        b'{"model": 5, "prompt": "x"}',
        b"[" * 100_000,
    ],
)
def test_bodies_that_are_none(fast, body):
    answer = httpx.post(f"{fast.url}/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{fast.url}/livez").text == "ok"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b'{"model": "tiny"}', None, "sent with content-type: application/json"),
        (b"[]", "application/json", "must be a JSON object"),
        (b"\xff", "application/json", "not valid JSON in UTF-8"),
    ],
)
def test_a_body_that_is_none_says_what_one_is(fast, content, kind, message):
    headers = {} if kind is None else {"content-type": kind}
    answer = httpx.post(f"{fast.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("completions", {"prompt": [5, "x"]}, "prompt", "must be a text, token ids, or a list"),
        ("completions", {}, "prompt", "prompt is missing"),
        ("completions", {"prompt": "x", "echo": True}, "echo", "echo is not supported"),
        ("embeddings", {"input": ""}, "input", "input: is empty"),
        ("embeddings", {"input": [99999]}, "input", "is not in the vocabulary"),
        ("embeddings", {"input": []}, "input", "must be a text, token ids, or a list"),
    ],
)
def test_a_400_names_the_field_as_the_client_does(fast, path, body, param, message):
    answer = httpx.post(f"{fast.url}/v1/{path}", json={"model": "tiny", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_a_token_that_the_vocabulary_lacks_is_the_clients_mistake(fast):
    body = {"model": "tiny", "prompt": [99999], "max_tokens": 1}
    answer = httpx.post(f"{fast.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "vocabulary" in answer.json()["error"]["message"]


def test_unknown_models_and_paths(client, fast):
    with pytest.raises(NotFoundError, match="there is tiny"):
        client.completions.create(model="../../etc/passwd", prompt="x")
    answer = httpx.get(f"{fast.url}/v1/nothing")
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{fast.url}/v1/completions").status_code == 405


def test_a_client_that_goes_away_frees_its_slot(served):
    with served(token_s=0.5) as running:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "stream": True}
        for is_stream in (True, False):
            with httpx.Client() as client:
                if is_stream:
                    with client.stream(
                        "POST", f"{running.url}/v1/completions", json=body
                    ) as answer:
                        next(answer.iter_lines())
                else:
                    with pytest.raises(httpx.ReadTimeout):
                        body["stream"] = False
                        client.post(
                            f"{running.url}/v1/completions",
                            json=body,
                            timeout=httpx.Timeout(120, read=0.3),
                        )
            deadline_s = time.monotonic() + 120  # the whole answer takes 200
            while running.engine.running or running.gateway.admission.running:
                assert time.monotonic() < deadline_s
                time.sleep(0.005)


def test_more_than_fits_is_told_to_come_back(served):
    with served(token_s=0.3, max_running=2, admission__max_queued_requests=1) as running:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "stream": True}
        url = f"{running.url}/v1/completions"
        with httpx.Client() as client, client.stream("POST", url, json=body) as one:
            with client.stream("POST", url, json=body) as two:
                lines = one.iter_lines(), two.iter_lines()  # they close what they read when gone
                assert all(map(next, lines))
                running.gateway.admission._limits.max_queued_requests = 0
                with OpenAI(base_url=f"{running.url}/v1", api_key="a", max_retries=0) as openai:
                    with pytest.raises(RateLimitError) as caught:
                        openai.completions.create(model="tiny", prompt="x")
                assert int(caught.value.response.headers["retry-after"]) >= 1
                assert caught.value.code == "queue_full"


def test_a_deadline_ends_a_stream_with_an_error(served):
    with served(token_s=0.05) as running:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "stream": True}
        headers = {"x-request-timeout": "1"}
        url = f"{running.url}/v1/completions"
        for _ in range(20):  # a slow machine may have said nothing by the deadline: that is a 504
            with httpx.stream("POST", url, json=body, headers=headers) as answer:
                if answer.status_code == 504:
                    continue
                events = list(stream_lines(answer))
                break
        assert events[-1]["error"]["code"] == "deadline"
        assert running.engine.running == 0
        body = {"model": "tiny", "prompt": "x", "max_tokens": 400}
        assert httpx.post(url, json=body, headers=headers).status_code == 504


def test_an_engine_that_loses_a_request(served):
    with served() as running:
        running.engine.fails = EngineError("gone")
        with OpenAI(base_url=f"{running.url}/v1", api_key="a", max_retries=0) as client:
            with pytest.raises(APIError, match="gone") as caught:
                client.completions.create(model="tiny", prompt="x")
            assert caught.value.status_code == 503
        assert running.gateway.admission.running == 0
        metrics = httpx.get(f"{running.url}/metrics").text
        assert 'spotforge_request_failed_total{key="anonymous",model="tiny"' in metrics


def test_keys(served, tmp_path):
    path = tmp_path / "keys.json"
    secret = create(path, "alice")
    with served(keys=Keys.load(path)) as running:
        for key, works in ((secret, True), ("sf-wrong", False)):
            with OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0) as client:
                if works:
                    client.completions.create(model="tiny", prompt="x", max_tokens=1)
                else:
                    with pytest.raises(AuthenticationError):
                        client.completions.create(model="tiny", prompt="x", max_tokens=1)
        metrics = httpx.get(f"{running.url}/metrics").text
        assert 'spotforge_prompt_tokens_total{key="alice",model="tiny"' in metrics
        assert secret not in metrics and secret not in path.read_text()


def test_what_cannot_be_done_is_not_to_be_asked_again(fast, monkeypatch):
    monkeypatch.setattr(fast.engine, "fails", EngineFailed("its embeddings have no such layer"))
    body = {"model": "tiny", "prompt": "x"}
    answer = httpx.post(f"{fast.url}/v1/completions", json=body)
    assert answer.status_code == 500 and "retry-after" not in answer.headers
    assert answer.headers["x-should-retry"] == "false"  # which OpenAI's clients heed


def test_what_is_written_down_holds_no_text(served, tmp_path):
    settings = {
        "log__requests": str(tmp_path / "requests.jsonl"),
        "log__drift": str(tmp_path / "drift.jsonl"),
        "log__drift_share": 1.0,
    }
    with served(**settings) as running:
        body = {"model": "tiny", "prompt": "secretword", "max_tokens": 5}
        answer = httpx.post(f"{running.url}/v1/completions", json=body)
    [request] = map(json.loads, (tmp_path / "requests.jsonl").read_text().splitlines())
    assert request["id"] == answer.headers["x-request-id"] == answer.json()["id"][5:]
    assert request["artifact"] == running.artifact.digest
    assert (request["status"], request["completion_tokens"]) == ("ok", 5)
    [drift] = map(json.loads, (tmp_path / "drift.jsonl").read_text().splitlines())
    assert drift["id"] == request["id"] and drift["mean_logprob"] == -0.5
    assert answer.json()["choices"][0]["logprobs"] is None  # the client asked for none
    assert sum(drift["prompt_buckets"]) == drift["prompt_tokens"] == request["prompt_tokens"]
    for file in tmp_path.iterdir():
        assert "secretword" not in file.read_text() and "the cat" not in file.read_text()


def test_text_is_written_down_where_it_is_asked_for(served, tmp_path):
    log = tmp_path / "requests.jsonl"
    with served(log__requests=str(log), log__text=True) as running:
        body = {"model": "tiny", "prompt": ["secretword", "b"], "max_tokens": 5, "n": 2}
        answer = httpx.post(f"{running.url}/v1/completions", json=body).json()
        messages = [{"role": "user", "content": "another"}]
        chat = {"model": "tiny", "messages": messages, "max_tokens": 3}
        httpx.post(f"{running.url}/v1/chat/completions", json=chat)
    completion, chat = map(json.loads, log.read_text().splitlines())
    assert completion["prompts"] == ["secretword", "b"]
    assert completion["completions"] == [choice["text"] for choice in answer["choices"]]
    assert chat["prompts"][0]["messages"] == messages


def test_null_is_a_default(served):
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "stream", "stop")
    names += ("max_tokens", "seed", "logprobs", "frequency_penalty", "presence_penalty", "user")
    fields = dict.fromkeys((*names, "logit_bias", "stream_options", "ignore_eos"))
    nulls = dict.fromkeys(
        ("audio", "max_completion_tokens", "metadata", "modalities", "moderation", "prediction")
        + ("prompt_cache_key", "reasoning_effort", "safety_identifier", "service_tier", "store")
        + ("top_logprobs", "verbosity", "tools", "tool_choice", "parallel_tool_calls")
        + ("response_format", "functions", "function_call", "web_search_options")
    )
    with served() as running:
        others = dict.fromkeys(("best_of", "echo", "suffix"))
        body = {"model": "tiny", "prompt": "a", **fields, **others}
        answer = httpx.post(f"{running.url}/v1/completions", json=body).json()
        chat = {"model": "tiny", "messages": HELLO, **fields, **nulls, "max_tokens": 2}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=chat).status_code == 200
        embed = {"model": "tiny", "input": "a", "encoding_format": None, "dimensions": None}
        assert httpx.post(f"{running.url}/v1/embeddings", json=embed).status_code == 200
    assert answer["usage"]["completion_tokens"] == 16 and len(answer["choices"]) == 1


def test_an_answer_goes_back_as_it_was_dumped(client, fast):
    message = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6)
    message = message.choices[0].message.model_dump()
    assert message["annotations"] is None
    messages = [*HELLO, message, *HELLO]
    client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    prompt = fast.files.tokenizer().decode(fast.engine.seen[-1].prompt)
    assert prompt.count("<user>hello") == 2 and f"<assistant>{message['content']}" in prompt


def test_parts_of_a_message_are_lines(client, fast):
    parts = [{"type": "text", "text": text} for text in ("What is", "the best book")]
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=1
    )
    prompt = fast.files.tokenizer().decode(fast.engine.seen[-1].prompt)
    assert prompt == "<user>What is\nthe best book\n<assistant>"


def test_a_long_prompt_is_not_blamed_on_a_limit_that_nobody_gave(fast):
    url, body = f"{fast.url}/v1/completions", {"model": "tiny", "prompt": [5] * 505}
    answer = httpx.post(url, json=body)  # the default of 16 does not fit
    assert answer.json()["usage"]["completion_tokens"] == 7
    for size, more in ((512, {}), (900, {}), (512, {"max_tokens": 1})):
        error = httpx.post(url, json=body | {"prompt": [5] * size, **more}).json()["error"]
        assert error["param"] == "prompt" and f"the prompt has {size} tokens" in error["message"]
        assert "max_tokens" not in error["message"]
    error = httpx.post(url, json=body | {"max_tokens": 9}).json()["error"]
    assert error["param"] == "max_tokens" and "together 514" in error["message"]


def test_parallel_calls_are_only_told_where_they_are_wanted(fast, monkeypatch):
    text = "".join(f'<tool_call>{{"name": "f{i}", "arguments": {{}}}}</tool_call>' for i in (1, 2))
    monkeypatch.setattr(fast.engine, "tokens", fast.files.tokenizer().encode(text).ids)
    body = {"model": "tiny", "messages": HELLO, "tools": [TOOL]}
    body["max_tokens"] = len(fast.engine.tokens)
    url = f"{fast.url}/v1/chat/completions"
    for is_parallel, names in ((True, ["f1", "f2"]), (None, ["f1", "f2"]), (False, ["f1"])):
        asked = body | {"parallel_tool_calls": is_parallel}
        [choice] = httpx.post(url, json=asked).json()["choices"]
        calls = choice["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == names
        with httpx.stream("POST", url, json=asked | {"stream": True}) as stream:
            parts = [line["choices"][0] for line in stream_lines(stream) if line != "[DONE]"]
        calls = [call for part in parts for call in part["delta"].get("tool_calls", ())]
        assert [(call["index"], call["function"]["name"]) for call in calls] == [*enumerate(names)]
        assert parts[-1]["finish_reason"] == "tool_calls"
