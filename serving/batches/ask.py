"""Lines as requests to the gateway: in its own process, or over HTTP."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.batches.ledger import Line
from serving.batches.runner import Reply
from serving.gateway.gateway import OWNER

_RETRY_S = 5.0
_log = logging.getLogger("spotforge.serving")


async def ask_app(app: ASGIApp, line: Line) -> Reply:
    """Asks the app in this process, in the name of the key that made the batch."""

    async def as_owner(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, OWNER: line.owner}, receive, send)

    transport = httpx.ASGITransport(as_owner, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        response = await client.post(line.url, content=_body(line), headers=_headers())
    return _reply(response)


async def ask_over_http(client: httpx.AsyncClient, line: Line) -> Reply | None:
    """Asks a gateway; None where none answers.

    Args:
        client: With the gateway's address, and a key that it knows.
        line: What is asked.
    """
    try:
        response = await client.post(line.url, content=_body(line), headers=_headers())
    except httpx.TransportError as e:
        _log.warning("the gateway cannot be reached: %s", e or type(e).__name__)
        return None
    if response.status_code in (502, 503, 504) and _json(response) is None:
        _log.warning("a proxy answers for the gateway: status %d", response.status_code)
        return None
    if response.status_code == 401:
        _log.error("the gateway does not know the worker's key")
        return None
    return _reply(response)


def _body(line: Line) -> bytes:
    """In ASCII: a text may hold half a surrogate pair, which has no UTF-8."""
    return json.dumps(line.body).encode()


def _headers() -> dict[str, str]:
    return {"content-type": "application/json", "x-priority": "batch"}


def _reply(response: httpx.Response) -> Reply:
    body = _json(response)
    if body is None:
        body = {"error": {"message": response.text[:1000], "type": "server_error"}}
    retry_after = response.headers.get("retry-after")
    if retry_after is not None:  # a proxy may say a date
        retry_after = float(retry_after) if retry_after.isdecimal() else _RETRY_S
    return Reply(response.status_code, response.headers.get("x-request-id", ""), body, retry_after)


def _json(response: httpx.Response) -> Any:
    """None where it is none."""
    try:
        return response.json()
    except ValueError:
        return None
