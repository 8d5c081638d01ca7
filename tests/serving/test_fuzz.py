"""Whatever comes over HTTP gets an answer below 500, and errors are in OpenAI's shape."""

import http.client
import json

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/models/%2e%2e/x",
    "/v1/../admin/swap",
    "//v1/completions",
    "/%00",
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = ("prompt", "messages", "input", "max_tokens", "temperature", "stop", "n", "stream", "seed")
NAMES += ("tools", "response_format", "chat_template_kwargs", "logprobs", "stream_options", "user")
RIGHT = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "input": "x"}
requests = st.dictionaries(st.sampled_from(NAMES), values, max_size=3)
bodies = (
    st.binary(max_size=200)
    | values.map(lambda value: json.dumps(value).encode())
    | requests.map(lambda body: json.dumps({"model": "tiny"} | body).encode())
    | st.tuples(st.sampled_from(list(RIGHT)), requests).map(
        lambda pair: json.dumps({"model": "tiny", pair[0]: RIGHT[pair[0]]} | pair[1]).encode()
    )
    | st.integers(1, 50_000).map(lambda n: b'{"model": "tiny", "prompt": ' + b"[" * n)
    | st.integers(1, 900).map(
        lambda n: (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}],'
            b'"chat_template_kwargs": ' + b'{"a":' * n + b"1" + b"}" * (n + 1)
        )
    )
)
headers = st.dictionaries(
    st.sampled_from(["content-type", "x-request-timeout", "x-priority", "authorization", "accept"]),
    st.sampled_from(["application/json", "", "nan", "-1", "1e999", "batch", "text/plain", "\xff"]),
)


@pytest.fixture(scope="module")
def fast(served):
    with served() as running:
        yield running


@seed(1)
@settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["POST", "POST", "POST", "GET", "DELETE", "PUT", "OPTIONS"]),
    path=st.sampled_from(PATHS[:3]) | st.sampled_from(PATHS),
    body=bodies,
    headers=headers,
)
def test_no_request_is_answered_with_a_5xx(fast, method, path, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", fast.port, timeout=120)
    connection.request(method, path, body, {"content-type": "application/json"} | headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    assert response.status < 500, content
    if response.status >= 400:
        error = json.loads(content)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
