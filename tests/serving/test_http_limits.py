"""A real uvicorn on loopback, and clients that mean harm or are broken."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import socket
import threading
import time

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from core.errors import ConfigError
from core.settings.rules import check_settings
from serving.gateway.http_limits import BodyLimits, HttpLimits, limited_protocol

HEADER_TIMEOUT_S = 1.5
BODY_TIMEOUT_S = 1.5


def build_app():
    app = FastAPI()

    @app.post("/length")
    async def length(request: Request):
        return {"length": len(await request.body())}

    @app.post("/files")
    async def files(request: Request):
        return {"length": len(await request.body())}

    @app.get("/hello")
    async def hello(n: int = 0):
        return {"n": n}

    @app.get("/stream")
    async def stream():
        async def chunks():
            for i in range(10):
                yield f"{i}\n"
                await asyncio.sleep(HEADER_TIMEOUT_S / 5)

        return StreamingResponse(chunks())

    @app.get("/held")
    async def held():
        """Ends when the test sets `app.state.is_open`."""

        async def chunks():
            yield "begun\n"
            while not app.state.is_open.is_set():
                await asyncio.sleep(0.01)
            yield "over\n"

        return StreamingResponse(chunks())

    app.state.is_open = threading.Event()
    return app


@contextlib.contextmanager
def serve(app, guard, **options):
    """A server in a thread; gives its address and what it logs."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))
    loggers = [logging.getLogger(name) for name in ("uvicorn", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    config = uvicorn.Config(
        app,
        http=limited_protocol(guard),
        port=0,
        log_config=None,
        lifespan="off",
        timeout_graceful_shutdown=2,
        **options,
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname(), lines
    finally:
        server.should_exit = True
        thread.join(timeout=120)
        listener.close()
        for logger in loggers:
            logger.removeHandler(handler)
    assert not thread.is_alive()
    assert "Traceback" not in "\n".join(lines)


@pytest.fixture(autouse=True)
def short_linger(monkeypatch):
    monkeypatch.setattr("serving.gateway.http_limits._LINGER_S", 0.3)


# Its timeouts no machine exceeds that is only slow.
GUARD = HttpLimits(
    header_timeout_s=120,
    max_body_bytes=100_000,
    max_body_bytes_of={"/files": 300_000},
    body_timeout_s=120,
)
IMPATIENT = dataclasses.replace(
    GUARD, header_timeout_s=HEADER_TIMEOUT_S, body_timeout_s=BODY_TIMEOUT_S
)


@pytest.fixture(scope="module")
def app():
    return build_app()


@pytest.fixture(scope="module")
def address(app):
    with serve(BodyLimits(app, GUARD), GUARD) as (address, _):
        yield address


@pytest.fixture(scope="module")
def impatient_app():
    return build_app()


@pytest.fixture(scope="module")
def impatient_address(impatient_app):
    with serve(BodyLimits(impatient_app, IMPATIENT), IMPATIENT) as (address, _):
        yield address


class Client:
    """A connection, and what comes back on it."""

    def __init__(self, address):
        self.since_s = time.monotonic()
        self.socket = socket.create_connection(address, timeout=120)
        self.file = self.socket.makefile("rb")

    def close(self):
        self.file.close()
        self.socket.close()

    def send(self, data):
        self.sent_s = time.monotonic()
        self.socket.sendall(data)
        return self

    def flood(self, piece, limit_s=120):
        """Sends until the server has had enough."""
        self.socket.settimeout(limit_s)
        sent, end = 0, time.monotonic() + limit_s
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                self.socket.sendall(piece)
                sent += len(piece)
        assert time.monotonic() < end, "the server took all of it"
        return sent

    def answer(self):
        """(status, body) of the next answer; (None, b"") at the end."""
        line = self.file.readline()
        if not line:
            return None, b""
        headers = {}
        while (header := self.file.readline().strip()) != b"":
            name, _, value = header.partition(b":")
            headers[name.lower()] = value.strip()
        self.headers = headers
        if headers.get(b"transfer-encoding") == b"chunked":
            body = b""
            while size := int(self.file.readline(), 16):
                body += self.file.read(size)
                self.file.readline()
            self.file.readline()
        else:
            body = self.file.read(int(headers[b"content-length"]))
        return int(line.split()[1]), body

    def refusal(self, status, code):
        """Asserts that the next answer is the refusal, in OpenAI's shape, and the last."""
        found, body = self.answer()
        error = json.loads(body)["error"]
        assert (found, error["code"]) == (status, code)
        assert error.keys() == {"message", "type", "param", "code"}
        assert self.headers[b"connection"] == b"close"
        with contextlib.suppress(ConnectionError):
            assert self.file.read() == b""
        self.close()


@pytest.fixture
def client(address):
    client = Client(address)
    yield client
    client.close()


@pytest.fixture
def slow_client(impatient_address):
    client = Client(impatient_address)
    yield client
    client.close()


def get(path="/hello", headers=""):
    return f"GET {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n".encode()


def post(body=b"", path="/length", headers=None):
    headers = f"content-length: {len(body)}\r\n" if headers is None else headers
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n".encode() + body


CHUNKED = "transfer-encoding: chunked\r\n"


def drip(client, data, since_s=None, every_s=0.1, limit_s=120):
    """Sends a byte at a time until the server answers.

    Returns:
        Seconds that it took, since something that the test did before, or since the first byte.
    """
    started = time.monotonic() if since_s is None else since_s
    client.socket.settimeout(every_s)
    for i in range(int(limit_s / every_s)):
        client.send(data[i % len(data) : i % len(data) + 1])
        with contextlib.suppress(TimeoutError):
            client.socket.recv(1, socket.MSG_PEEK)
            break
    client.socket.settimeout(120)
    return time.monotonic() - started


@pytest.mark.parametrize("data", [b"GET /hello HTTP/1.1\r\nx: " + b"a" * 99, b"\r\n"])
@pytest.mark.parametrize("before", [0, 2])
def test_headers_that_come_too_slowly(slow_client, before, data):
    client = slow_client
    client.send(get() * before)
    for _ in range(before):
        assert client.answer()[0] == 200
    elapsed_s = drip(client, data, client.since_s if before == 0 else None)
    assert HEADER_TIMEOUT_S * 0.9 < elapsed_s < 120
    client.refusal(408, "header_timeout")


def test_a_connection_on_which_nothing_comes_is_closed(slow_client):
    slow_client.refusal(408, "header_timeout")


def test_others_are_answered_meanwhile(impatient_address):
    slow = [Client(impatient_address).send(b"POST /length HTTP/1.1\r\n") for _ in range(100)]
    quick = Client(impatient_address)
    for i in range(20):
        assert quick.send(get(f"/hello?n={i}")).answer() == (200, b'{"n":%d}' % i)
    for client in slow:
        client.refusal(408, "header_timeout")
    quick.close()


def test_a_header_line_that_never_ends(client):
    client.send(b"GET /hello HTTP/1.1\r\nx: ")
    client.send(b"a" * 40_000)
    client.refusal(431, "headers_too_large")


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /hello HTTP/1.1\r\nx: ", b"a"),
        (b"GET /", b"a"),
        (b"\r\n", b"\r\n"),
        (post(headers=CHUNKED) + b"1\r\na\r\n0\r\nx: ", b"a"),  # a trailer
        (post(headers=CHUNKED) + b"1;x=", b"a"),  # a chunk extension
    ],
)
def test_a_flood_without_end_is_cut_off(client, start, more):
    client.send(start)
    assert client.flood(more * (65_536 // len(more))) < 50e6
    with contextlib.suppress(ConnectionError):  # it kept sending into a closed connection
        assert client.answer()[0] in (431, None)


def test_ten_thousand_headers(client):
    client.send(get(headers="".join(f"x{i}: 1\r\n" for i in range(10_000))))
    client.refusal(431, "headers_too_large")


def test_many_short_headers_in_one_packet_never_reach_the_app(client):
    client.send(get(headers="a:b\r\n" * 100))  # and the host's
    client.refusal(431, "headers_too_large")


def test_as_many_headers_as_are_allowed(client):
    assert client.send(get(headers="a:b\r\n" * 99)).answer()[0] == 200
    long = "".join(f"x{i}: {'a' * 1_500}\r\n" for i in range(20))
    for _ in range(2):  # the count begins anew
        assert client.send(get(headers=long)).answer()[0] == 200


def test_a_large_content_length_is_refused_before_its_body(client):
    client.send(post(headers="content-length: 99999999999\r\n"))
    client.refusal(413, "request_too_large")


def test_a_large_body_that_is_sent_all_the_same_does_not_hide_the_answer(client):
    client.send(post(b"a" * 12_000_000))
    client.refusal(413, "request_too_large")


def test_nor_does_what_is_sent_after_bytes_that_are_no_http(client):
    client.send(b"nonsense\r\n\r\n" + b"a" * 12_000_000)
    client.refusal(400, "invalid_http")


def test_a_client_that_asks_first_sends_nothing(client):
    client.send(post(headers="content-length: 100001\r\nexpect: 100-continue\r\n"))
    client.refusal(413, "request_too_large")


def test_a_chunked_body_without_end(client):
    client.send(post(headers=CHUNKED))
    assert client.flood(b"10000\r\n" + b"a" * 65_536 + b"\r\n") < 50e6


def test_a_chunked_body_that_is_too_large(client):
    client.send(post(headers=CHUNKED))
    for _ in range(2):
        client.send(b"c350\r\n" + b"a" * 50_000 + b"\r\n")
    client.send(b"1\r\na\r\n0\r\n\r\n")
    client.refusal(413, "request_too_large")


@pytest.mark.parametrize("headers", [CHUNKED, "content-length: 50000\r\n"])
def test_a_body_that_comes_too_slowly(slow_client, headers):
    client = slow_client
    client.send(post(headers=headers))
    elapsed_s = drip(client, b"1\r\na\r\n", client.sent_s)
    assert BODY_TIMEOUT_S * 0.9 < elapsed_s < 120
    client.refusal(408, "body_timeout")


def test_a_body_at_the_limit_and_one_of_a_path_that_may_have_more(client):
    assert client.send(post(b"a" * 100_000)).answer() == (200, b'{"length":100000}')
    assert client.send(post(b"a" * 300_000, "/files")).answer() == (200, b'{"length":300000}')
    client.send(post(b"a" * 300_001, "/files"))
    client.refusal(413, "request_too_large")


def test_small_chunks_are_no_flood(client):
    body = b"1\r\na\r\n" * 20_000 + b"0\r\nx: 1\r\n\r\n"
    assert client.send(post(body, headers=CHUNKED)).answer() == (200, b'{"length":20000}')


def test_pipelining_and_keep_alive(client):
    requests = [get(f"/hello?n={i}") + post(b"a" * i) for i in range(0, 2_000, 100)]
    client.send(b"".join(requests))
    for i in range(0, 2_000, 100):
        assert client.answer() == (200, b'{"n":%d}' % i)
        assert client.answer() == (200, b'{"length":%d}' % i)


def test_between_requests_no_header_is_late(slow_client):
    assert slow_client.send(get()).answer()[0] == 200
    time.sleep(HEADER_TIMEOUT_S * 1.5)
    assert slow_client.send(get()).answer()[0] == 200


def test_a_stream_outlasts_the_header_timeout_of_what_was_begun_behind_it(
    slow_client, impatient_app
):
    client, is_open = slow_client, impatient_app.state.is_open
    is_open.clear()
    client.send(get("/held") + b"GET /hello HT")
    time.sleep(HEADER_TIMEOUT_S * 1.9)
    is_open.set()
    assert client.answer() == (200, b"begun\nover\n")
    time.sleep(HEADER_TIMEOUT_S * 0.3)  # the time of the stream counts for nothing
    assert client.send(b"TP/1.1\r\n\r\n").answer()[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /hello HTTP/9.9\r\n\r\n",
        b"GET /hello HTTP/1.1\r\na\x00b: c\r\n\r\n",
        b"GET /hell\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        post(headers="content-length: 1\r\ncontent-length: 2\r\n"),
        post(headers="content-length: 99999999999999999999999\r\n"),
        post(headers="content-length: -1\r\n"),
        post(headers="content-length: 1\r\n" + CHUNKED),
        post(headers=CHUNKED) + b"xyz\r\n",
    ],
)
def test_what_is_no_http(client, data):
    client.send(data).refusal(400, "invalid_http")


def test_nonsense_behind_a_stream_does_not_get_into_it(client, app):
    app.state.is_open.clear()
    client.send(get("/held"))
    assert any(b"begun" in line for line in client.file)
    client.send(b"nonsense\r\n\r\n")
    assert b"invalid" not in client.file.read()
    app.state.is_open.set()


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
def test_an_upgrade_is_answered_as_if_it_had_not_been_asked_for(client, upgrade):
    client.send(get(headers=f"connection: upgrade\r\nupgrade: {upgrade}\r\n"))
    assert client.answer()[0] == 200


@pytest.mark.parametrize(
    ("limits", "status"),
    [({"max_connections": 3}, 503), ({"max_connections_per_client": 3}, 429)],
)
def test_connections_over_a_limit_are_told_so(limits, status):
    guard = HttpLimits(**limits)
    with serve(BodyLimits(build_app(), guard), guard) as (address, _):
        clients = [Client(address) for _ in range(3)]
        assert all(client.send(get()).answer()[0] == 200 for client in clients)
        Client(address).refusal(status, "too_many_connections")
        clients.pop().close()
        while True:  # until the server has seen it go
            clients.append(Client(address))
            if clients[-1].send(get()).answer()[0] == 200:
                break
            clients.pop().close()
        assert all(client.send(get()).answer()[0] == 200 for client in clients)
        for client in clients:
            client.close()


def test_a_client_that_does_not_read_its_answer_is_cut_off():
    app, ended = FastAPI(), []

    @app.get("/endless")
    async def endless():
        async def chunks():
            try:
                while True:
                    yield b"x" * 65_536
                    await asyncio.sleep(0)
            finally:
                ended.append(time.monotonic())

        return StreamingResponse(chunks())

    guard = HttpLimits(write_timeout_s=2.0)
    with serve(BodyLimits(app, guard), guard) as (address, _):
        for _ in range(10):
            ended.clear()
            idle, reads = Client(address), Client(address)
            started = last_read = time.monotonic()
            longest_s = 0.0
            for client in (idle, reads):
                client.send(get("/endless"))
            with contextlib.suppress(ConnectionError):
                while not ended:
                    assert time.monotonic() - started < 120, "it is not cut off"
                    reads.socket.recv(2**20)  # it reads, if slowly, and is left alone
                    time.sleep(0.02)
                    longest_s = max(longest_s, time.monotonic() - last_read)
                    last_read = time.monotonic()
            if longest_s < 1.0:
                break
            # This process got no CPU and read nothing: again.
            for client in (idle, reads):
                client.close()
            while len(ended) < 2:
                assert time.monotonic() - started < 240, "a stream goes on without a client"
                time.sleep(0.02)
        assert len(ended) == 1 and ended[0] - started > 1.8
        assert reads.socket.recv(2**20)
        reads.close()
        idle.close()


def test_clients_that_leave_and_refusals_leave_nothing_behind():
    guard = HttpLimits(header_timeout_s=1.0, body_timeout_s=1.0, max_body_bytes=1_000)
    app = build_app()
    with serve(BodyLimits(app, guard), guard) as (address, lines):
        for data in (b"", b"GET", post(headers="content-length: 9\r\n"), get("/stream"), get()):
            Client(address).send(data).close()
        for _ in range(50):
            Client(address).send(b"nonsense\r\n\r\n").close()
        time.sleep(1.5)  # all of them are late by now
        last = Client(address)
        assert last.send(get()).answer()[0] == 200
        last.close()
    assert set(lines) == {"Invalid HTTP request received."}


@pytest.mark.parametrize("wrong", [{"max_body_bytes": 0}, {"max_body_bytes_of": {"/files": -1}}])
def test_limits_that_let_nobody_in_are_refused(wrong):
    with pytest.raises(ConfigError, match="guard."):
        check_settings(HttpLimits(**wrong), "guard")
