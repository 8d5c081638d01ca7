"""A client of `/v1/completions` that sends token ids and receives token ids or text.

There are two dialects. vLLM returns the ids of generated tokens if `return_token_ids` is set, and
writes tokens with log-probabilities as `token_id:5`. Other servers return text: each piece counts
as one token, and the last chunk adds what the server's `usage` counts beyond that.
"""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from core.errors import ConfigError, SpotforgeError
from serving.engine import EngineError, EngineRefused, TokenChunk, TokenLogprob, TokenRequest

_CONNECT_TIMEOUT_S = 10.0
_RETRY_S = 1  # if a busy server sends no Retry-After
_ID = "token_id:"
_CACHE_METRIC = "vllm:kv_cache_usage_perc"
_LONGEST_MESSAGE = 300  # characters of a server's error


class Lost(EngineError):
    """The server lost the request because it ended or failed; the request may be repeated."""


@dataclass(frozen=True)
class Server:
    """Properties that a server reports.

    Attributes:
        name: Program and version, as far as they are known.
        model: Name of the model at the server.
        max_context: Tokens of prompt and answer together, at most; None: unknown.
        tells_ids: True: the server speaks vLLM's dialect.
    """

    name: str
    model: str
    max_context: int | None
    tells_ids: bool


def http_client(
    url: str, silence_s: float, api_key: str | None = None, unix_socket: str | None = None
) -> httpx.AsyncClient:
    """Returns a client with pooled connections to one server, without the environment's proxies.

    Args:
        url: URL of the server, without `/v1`.
        silence_s: Seconds that a stream may go without a byte.
        api_key: API key for the server; None: no key is sent.
        unix_socket: Path of the socket to connect to, whatever the URL's host is; None: the URL's
            host.
    """
    verify = ssl.create_default_context() if url.startswith("https:") else True
    return httpx.AsyncClient(
        base_url=url,
        headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(silence_s, connect=_CONNECT_TIMEOUT_S, pool=None),
        transport=httpx.AsyncHTTPTransport(
            verify=verify,
            uds=unix_socket,
            trust_env=False,
            # Admission bounds the streams; a limit of the pool would be a second, hidden queue.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        ),
        trust_env=False,
    )


class CompletionsClient:
    """A client of one model of one server.

    Args:
        http: Client from `http_client`; `close` closes it.
        model: Name of the model at the server; None: the server has only one.
    """

    def __init__(self, http: httpx.AsyncClient, model: str | None = None) -> None:
        self._http, self._asked_model = http, model
        self._server: Server | None = None

    async def connect(self) -> Server:
        """Finds the model, and generates one token to find out the dialect.

        Raises:
            ConfigError: The named model is missing, or none is named and there are several.
            EngineError: The server cannot be reached, or generates no token.
        """
        models = (await self._get("/v1/models")).get("data") or []
        card = self._card(models)
        max_context = card.get("max_model_len")
        is_vllm = card.get("owned_by") == "vllm"
        name = f"remote {card['id']}"
        if is_vllm:
            name = "vllm"
            with contextlib.suppress(EngineError, KeyError):  # a router may not have /version
                name += f" {(await self._get('/version'))['version']}"
        for tells_ids in (True, False) if is_vllm else (False,):
            self._server = Server(name, card["id"], max_context, tells_ids)
            # vLLM before 0.10.2 ignores `return_token_ids`: it is used as a server of text.
            if await self.probe() or not tells_ids:
                break
        return self.server

    @property
    def server(self) -> Server:
        """Properties of the server, as `connect` found them."""
        assert self._server is not None, "connect first"
        return self._server

    async def probe(self) -> bool:
        """Generates one token; returns whether the server returned the token's id.

        Raises:
            EngineError: The server generated no token.
        """
        asked = TokenRequest("probe", [0], 1, temperature=0, ignore_eos=self.server.tells_ids)
        tokens: list[int] = []
        async for chunk in self.stream(asked):
            tokens += chunk.tokens
        return bool(tokens)

    async def kv_cache_usage(self) -> float:
        """Returns the share of the KV cache in use, 0 to 1; 0 for servers other than vLLM."""
        if not self.server.tells_ids:
            return 0.0
        try:
            response = await self._http.get("/metrics")
        except httpx.TransportError:
            return 0.0
        lines = [line for line in response.text.splitlines() if line.startswith(_CACHE_METRIC)]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    async def stream(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        """Generates a sequence; closing the iterator early closes the connection and cancels it.

        Raises:
            Lost: The connection broke, or the server failed.
            EngineRefused: The server did not accept the request.
            EngineError: The server was silent for too long, or sent something invalid.
        """
        body = self._body(request)
        read = self._ids if self.server.tells_ids else self._text
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, response.headers, await response.aread())
                async for chunk in read(request, _events(response)):
                    yield chunk
        except httpx.ReadTimeout as e:
            raise EngineError(f"sent nothing for {self._http.timeout.read:g} s") from e
        except httpx.TransportError as e:
            raise Lost(_reason(e)) from e

    async def close(self) -> None:
        """Closes all connections."""
        await self._http.aclose()

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            response = await self._http.get(path)
        except httpx.TransportError as e:
            raise Lost(f"cannot be reached: {_reason(e)}") from e
        if response.status_code != 200:
            raise _refusal(response.status_code, response.headers, response.content)
        try:
            content = response.json()
        except ValueError as e:
            raise EngineError(f"{path} is not JSON: does that server have OpenAI's API?") from e
        if not isinstance(content, dict):
            raise EngineError(f"{path} is not a JSON object: does that server have OpenAI's API?")
        return content

    def _card(self, models: list[dict[str, Any]]) -> dict[str, Any]:
        names = [str(model["id"]) for model in models]
        if self._asked_model is not None:
            if self._asked_model not in names:
                rule = f"is not one of the server's models: {', '.join(names) or 'it has none'}"
                raise ConfigError("engine.remote_model", self._asked_model, rule, "choose one")
            return models[names.index(self._asked_model)]
        if len(models) != 1:
            rule = f"must be given: the server has {', '.join(names) or 'no model'}"
            raise ConfigError("engine.remote_model", None, rule, "choose one")
        return models[0]

    def _body(self, request: TokenRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.server.model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            # The offset changes the seed: a continued request must not draw the numbers again
            # with which the lost one began.
            "seed": (request.seed + request.offset) % 2**63,
            "stream": True,
        }
        if request.ignore_eos:
            body["ignore_eos"] = True
        if not self.server.tells_ids:
            return body | {"stream_options": {"include_usage": True}}
        # All settings are sent, since vLLM takes missing ones from generation_config.json.
        body |= {
            "top_k": request.top_k,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "return_token_ids": True,
        }
        if request.logprobs is not None:
            body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
        if request.schema is not None:
            schema = {"name": "answer", "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def _ids(
        self, request: TokenRequest, events: AsyncIterator[dict[str, Any]]
    ) -> AsyncIterator[TokenChunk]:
        async for event in events:
            for choice in event.get("choices") or ():
                tokens, reason = list(choice.get("token_ids") or ()), choice.get("finish_reason")
                logprobs = None
                if request.logprobs is not None:
                    logprobs = _logprobs(choice.get("logprobs") or {}, request.logprobs)
                if reason == "stop":  # the last token is the EOS that ended the text
                    tokens = tokens[:-1]
                    logprobs = logprobs if logprobs is None else logprobs[:-1]
                yield TokenChunk(tokens, logprobs, _checked(reason))
                if reason is not None:
                    return
        raise Lost("the stream ended before the text did")

    async def _text(
        self, request: TokenRequest, events: AsyncIterator[dict[str, Any]]
    ) -> AsyncIterator[TokenChunk]:
        counted, total, reason = 0, 0, None
        async for event in events:
            total = (event.get("usage") or {}).get("completion_tokens") or total
            for choice in event.get("choices") or ():
                reason = choice.get("finish_reason") or reason
                if text := choice.get("text"):
                    counted += 1
                    yield TokenChunk([], None, None, text, 1)
        if reason is None:
            raise Lost("the stream ended before the text did")
        yield TokenChunk([], None, _checked(reason), "", max(0, total - counted))


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yields the server-sent events of a response; raises EngineError for an error event.

    Lines are split here and not by httpx, which also splits at U+2028, a valid character in JSON.
    """
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data:
                continue
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError as e:
                raise EngineError(f"sent an event that is not JSON: {_message(data)}") from e
            if (error := event.get("error")) is not None:
                code = error.get("code") if isinstance(error, dict) else None
                if isinstance(code, int) and code < 500:  # e.g. a schema without a grammar
                    raise EngineRefused(_message(data), None)
                raise Lost(_message(data))
            yield event


def _checked(reason: str | None) -> str | None:
    if reason not in (None, "stop", "length"):
        raise Lost(f"the server ended the request: {reason}")
    return reason


def _logprobs(told: dict[str, Any], alternatives: int) -> list[TokenLogprob]:
    found = []
    for own, top in zip(told.get("token_logprobs", ()), told.get("top_logprobs", ()), strict=True):
        # vLLM adds the generated token, even if it is not one of the likeliest.
        likeliest = sorted(top.items(), key=lambda item: -item[1])[:alternatives]
        found.append(TokenLogprob(own, [(int(t.removeprefix(_ID)), p) for t, p in likeliest]))
    return found


def _refusal(status: int, headers: httpx.Headers, body: bytes) -> SpotforgeError:
    text = f"{_message(body)} (status {status})"
    if status in (429, 503):
        after = headers.get("retry-after", "")
        return EngineRefused(text, int(after) if after.isdecimal() else _RETRY_S)
    if status in (400, 413, 422):
        return EngineRefused(text, None)
    return Lost(text) if status >= 500 else EngineError(text)


def _message(body: bytes) -> str:
    """Returns the error message in a response body, in one line."""
    said: Any = body.decode(errors="replace")
    try:
        said = json.loads(body)
        said = said["error"]
        said = said["message"]
    except (ValueError, KeyError, TypeError):
        pass  # not OpenAI's shape: `said` is what was found as far as it is
    return " ".join(str(said).split())[:_LONGEST_MESSAGE] or "no message"


def _reason(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
