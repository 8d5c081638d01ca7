"""Sends the lines of batches to the gateway, in its own process or over HTTP."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.batches.ledger import Line
from serving.batches.runner import Reply

# Key of an ASGI scope with the id of an API key: batches in this process act for its owner. No HTTP
# request can set it.
OWNER = "spotforge.owner"
_RETRY_S = 5.0
_log = logging.getLogger("spotforge.serving")


async def ask_app(app: ASGIApp, line: Line) -> Reply:
    """Sends a line to the app in this process, with the rights of the batch's owner."""

    async def as_owner(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, OWNER: line.owner}, receive, send)

    transport = httpx.ASGITransport(as_owner, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        response = await client.post(line.url, content=_body(line), headers=_headers())
    return _reply(response)


async def ask_over_http(client: httpx.AsyncClient, line: Line) -> Reply | None:
    """Sends a line to a gateway; returns its reply, or None if it cannot be reached.

    Args:
        client: Client with the gateway's address and a valid key.
        line: Line of a batch.
    """
    try:
        response = await client.post(line.url, content=_body(line), headers=_headers())
    except httpx.TransportError as e:
        _log.warning("the gateway cannot be reached: %s", e or type(e).__name__)
        return None
    # The gateway's own errors are JSON. Those of a proxy in front of it say nothing about the line.
    if response.status_code in (502, 503, 504) and _json(response) is None:
        _log.warning("a proxy answers instead of the gateway: status %d", response.status_code)
        return None
    if response.status_code == 401:
        _log.error("the gateway refuses the worker's API key")
        return None
    return _reply(response)


def _body(line: Line) -> bytes:
    """Returns a line's body as JSON in ASCII, since an unpaired surrogate has no UTF-8."""
    return json.dumps(line.body).encode()


def _headers() -> dict[str, str]:
    return {"content-type": "application/json", "x-priority": "batch"}


def _reply(response: httpx.Response) -> Reply:
    body = _json(response)
    if body is None:
        body = {"error": {"message": response.text[:1000], "type": "server_error"}}
    retry_after = response.headers.get("retry-after")
    if retry_after is not None:  # may be a date if it comes from a proxy
        retry_after = float(retry_after) if retry_after.isdecimal() else _RETRY_S
    return Reply(response.status_code, response.headers.get("x-request-id", ""), body, retry_after)


def _json(response: httpx.Response) -> Any:
    """Returns the JSON of a response; None: the response is not JSON."""
    try:
        return response.json()
    except ValueError:
        return None
