"""Limits that protect the app from hostile or broken clients.

`limited_protocol` checks bytes before there is a request: headers that never end, too many headers,
bytes that are not HTTP, too many connections, responses that the client does not read. `BodyLimits`
checks bodies. A refusal is sent in OpenAI's shape, and the connection is closed.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.config import HttpLimits

# The parser reports no positions, so header bytes are counted by the pieces that are fed to it.
_PIECE_BYTES = 4_096

# After a refusal this much is still read and dropped: closing at once would reset the connection,
# and a client that is still sending would not receive the response.
_LINGER_S = 1.0
_LINGER_BYTES = 16 * 2**20


def limited_protocol(guard: HttpLimits) -> type[HttpToolsProtocol]:
    """Returns the protocol class for uvicorn: `uvicorn.Config(app, http=limited_protocol(g))`."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"guard": guard})


class _LimitedProtocol(HttpToolsProtocol):
    """A connection.

    uvicorn does not limit what yields no event: the bytes since the last piece of a body or the
    last end of headers, and the time until headers end.
    """

    guard: HttpLimits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ws_protocol_class = None  # an upgrade to WebSocket would bypass these limits
        self._refused = False
        self._dropped_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._header_lines = 0
        self._pending_bytes = 0
        self._made_progress = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn has entered this connection in `connections` already.
        if len(self.connections) > self.guard.max_connections:
            self._refuse_connection(503, "the server has too many connections")
            return
        most = self.guard.max_connections_per_client
        if most is not None and self._connections_of_client() > most:
            self._refuse_connection(429, f"this address has {most} connections open already")
            return
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        # `abort` and not `close`, which would wait until the client has read the buffer.
        self._write_timer = self.loop.call_later(self.guard.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._dropped_bytes += len(data)
            if self._dropped_bytes > _LINGER_BYTES:
                self.transport.close()
            return
        for start in range(0, len(data), _PIECE_BYTES):
            if self._refused or self.transport.is_closing():
                return
            piece = data[start : start + _PIECE_BYTES]
            # The callbacks below set it when the parser gets past something: what never does is
            # counted, whatever it is meant to be.
            self._made_progress = False
            super().data_received(piece)
            self._pending_bytes = 0 if self._made_progress else self._pending_bytes + len(piece)
            if self._pending_bytes > self.guard.max_header_bytes:
                self._refuse_headers(f"more than {self.guard.max_header_bytes} bytes")
        # Between requests of a kept-alive connection, the next one has begun with these bytes.
        idle = self.cycle is None or self.cycle.response_complete
        if idle and not self._refused and self._header_timer is None:
            self._start_header_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._made_progress = True
        self._header_lines = 0
        if self._header_timer is None:
            self._start_header_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._header_lines += 1
        if self._header_lines > self.guard.max_header_lines:
            self._refuse_headers(f"more than {self.guard.max_header_lines} lines")
            raise ValueError("too many headers")  # makes the parser stop

    def on_headers_complete(self) -> None:
        self._made_progress = True
        self._stop_header_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._made_progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._made_progress = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        # Half of the next request may have come meanwhile: its time begins now, since a client may
        # read the response first.
        if self._header_timer is not None:
            self._stop_header_timer()
            self._start_header_timer()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "invalid_http", msg)

    def _connections_of_client(self) -> int:
        address = self.client and self.client[0]
        return sum(
            isinstance(other, _LimitedProtocol) and (other.client and other.client[0]) == address
            for other in self.connections
        )

    def _refuse_connection(self, status: int, message: str) -> None:
        self._refuse(status, "too_many_connections", message)
        self.transport.close()  # no lingering: connections are what there are too many of

    def _refuse_headers(self, what: str) -> None:
        self._refuse(431, "headers_too_large", f"the request's headers have {what}")

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Sends an error if the client would take it for the response to this request; closes."""
        if self._refused:
            return
        self._refused = True
        self._stop_header_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            # Another response is due: only if it is this request's own, and has not started, may
            # the error take its place.
            answerable = cycle.more_body and not cycle.response_started and not self.pipeline
            cycle.disconnected = True  # the app sees a disconnect, and what it sends is dropped
            cycle.message_event.set()
            if not answerable:
                self.transport.close()
                return
        headers, body = _refusal(status, code, message)
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
        lines += [name + b": " + value for name, value in headers]
        self.transport.write(b"\r\n".join([*lines, b"", body]))
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(
            self.guard.header_timeout_s, self._on_header_timeout
        )

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_header_timeout(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_header_timer()  # the previous request is still being answered
            return
        limit_s = self.guard.header_timeout_s
        self._refuse(408, "header_timeout", f"the headers did not end within {limit_s:g} s")


class BodyLimits:
    """ASGI middleware that refuses bodies that are too large or too slow.

    To the app, a refused request looks like one whose client has disconnected.

    Args:
        app: App that is wrapped.
        guard: Limits on bodies.
    """

    def __init__(self, app: ASGIApp, guard: HttpLimits) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        guard = self._guard
        limit = guard.max_body_bytes_of.get(scope["path"], guard.max_body_bytes)
        timeout_s = guard.body_timeout_s * max(1.0, limit / guard.max_body_bytes)
        exchange = _Exchange(limit, timeout_s, receive, send)
        length = next((v for name, v in scope["headers"] if name == b"content-length"), b"0")
        if int(length) > limit:  # the parser accepts digits only, so `int` does not fail
            await exchange.refuse_size()
            return
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            pass  # the client has disconnected, or was refused


class _Exchange:
    """A request and its response."""

    def __init__(self, limit: int, timeout_s: float, receive: Receive, send: Send) -> None:
        self._limit = limit
        self._timeout_s = timeout_s
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self._receive = receive
        self._send = send
        self._size = 0
        self._body_ended = False
        self._answered = False
        self._refused = False

    async def receive(self) -> Message:
        if self._refused:
            return {"type": "http.disconnect"}
        if self._body_ended:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError:
            text = f"the request's body did not come within {self._timeout_s:g} s"
            return await self._refuse(408, "body_timeout", text)
        self._size += len(message.get("body", b""))
        self._body_ended = not message.get("more_body", False)
        return await self.refuse_size() if self._size > self._limit else message

    async def send(self, message: Message) -> None:
        if not self._refused:
            self._answered = True
            await self._send(message)

    async def refuse_size(self) -> Message:
        """Sends 413."""
        text = f"the request's body is larger than {self._limit} bytes"
        return await self._refuse(413, "request_too_large", text)

    async def _refuse(self, status: int, code: str, message: str) -> Message:
        self._refused = True
        headers, body = _refusal(status, code, message)
        if not self._answered:
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
            # The response is complete only after the rest of the body: uvicorn closes the
            # connection then, and a client that is still sending must have read it before.
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            await self._drop_rest()
            await self._send({"type": "http.response.body"})
        return {"type": "http.disconnect"}

    async def _drop_rest(self) -> None:
        most = self._size + _LINGER_BYTES
        try:
            async with asyncio.timeout(_LINGER_S):
                while not self._body_ended and self._size < most:
                    message = await self._receive()
                    self._size += len(message.get("body", b""))
                    self._body_ended = not message.get("more_body", False)
        except TimeoutError:
            pass


def _refusal(status: int, code: str, message: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Returns headers and body of an error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    return headers, body
