"""The routes for clients, except those of files and batches."""

from __future__ import annotations

import array
import asyncio
import base64
import functools
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from monitoring.environment import describe_environment
from serving.batches.service import BatchService
from serving.errors import RequestError
from serving.gateway.batches import add_batches
from serving.gateway.errors import error_body, response_to
from serving.gateway.gateway import Gateway
from serving.gateway.generation import Chunks, Generation
from serving.gateway.incoming import key_of, request_of
from serving.gateway.invalid import describe
from serving.gateway.responses import Answer, ChatAnswer, CompletionAnswer
from serving.gateway.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from serving.models import AdaptedModel, Model
from serving.text.codec import Chat, TextChunk

T = TypeVar("T")

_UNREADABLE = "There was an error parsing the body"  # FastAPI's words
_CLOSED_REQUEST = 499  # nginx's status for a client that has disconnected; nobody receives it


class ErrorDetail(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of an error, in OpenAI's shape."""

    error: ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": about}
    for status, about in {
        400: "The request is not valid.",
        401: "The API key is not valid.",
        404: "The object does not exist.",
        408: "The request arrived too slowly.",
        409: "The state of the object does not allow that.",
        413: "The body is too large.",
        429: "A limit is reached: try again after `Retry-After` seconds.",
        431: "The headers are too large.",
        500: "The engine fails at this request and would fail again.",
        503: "The engine or the server is not available now.",
        504: "The deadline has passed.",
    }.items()
}
_STREAMED: dict[str, Any] = {
    "description": "The response; with `stream`, server-sent events.",
    "content": {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {},
    },
}


def make_app(gateway: Gateway, batches: BatchService | None = None) -> FastAPI:
    """Returns the clients' app with all routes.

    Args:
        gateway: State of the server; its models may be added later.
        batches: Files and batches; None: their routes do not exist.
    """
    app = FastAPI(
        title="spotforge serving",
        description="An OpenAI-compatible API over the models that are served here.",
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    app.state.gateway = gateway
    add_error_handlers(app)
    _add_health(app, gateway)
    _add_generation(app, gateway)
    if batches is not None:
        add_batches(app, gateway, batches.database, batches.queue)
    _document(app, with_keys=gateway.keys is not None)
    return app


@functools.cache
def _environment() -> dict[str, object]:
    """Returns a description of the environment; cached, since it starts git and never changes."""
    return describe_environment()


def _document(app: FastAPI, with_keys: bool) -> None:
    """Completes FastAPI's OpenAPI document with our errors and keys."""
    described = app.openapi()
    for path, operations in described["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's for an invalid body; ours is 400
            if with_keys and path.startswith("/v1/"):
                operation["security"] = [{"key": []}]
    if with_keys:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for name in ("HTTPValidationError", "ValidationError"):
        described["components"]["schemas"].pop(name, None)


def _add_generation(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/completions", tags=["generation"], responses={200: _STREAMED})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues a text."""
        asked = request_of(gateway, request, body, body.prompts())
        generation = await _unless_gone(request, gateway.begin(asked))
        answer = CompletionAnswer(generation, body.includes_usage())
        return await _respond(request, generation, answer, bool(body.stream))

    @app.post("/v1/chat/completions", tags=["generation"], responses={200: _STREAMED})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Continues a conversation."""
        tools = body.offered_tools()
        finds_calls = tools is not None and not body.must_call
        messages = [message.for_template() for message in body.messages]
        chat = Chat(messages, tools, body.chat_template_kwargs or {}, finds_calls)
        asked = request_of(gateway, request, body, [chat])
        generation = await _unless_gone(request, gateway.begin(asked))
        answer = ChatAnswer(
            generation,
            body.includes_usage(),
            finds_calls=body.function_names() if finds_calls else None,
            is_call=body.must_call,
            is_parallel=body.parallel_tool_calls is not False,
        )
        return await _respond(request, generation, answer, bool(body.stream))

    @app.post("/v1/embeddings", tags=["generation"])
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Returns the mean of the last hidden states of each input, scaled to unit length."""
        asked = request_of(gateway, request, body, body.inputs())
        vectors, num_tokens, version = await _unless_gone(request, gateway.embed(asked))
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        content = {"object": "list", "data": data, "model": body.model, "usage": usage}
        return JSONResponse(content, headers={"x-artifact-version": version})

    @app.get("/v1/models", tags=["models"])
    async def models(request: Request) -> dict[str, Any]:
        """Returns all models and adapters."""
        key_of(gateway, request)
        models = (gateway.models | gateway.adapted).values()
        return {"object": "list", "data": [_described(model) for model in models]}

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def model(name: str, request: Request) -> dict[str, Any]:
        """Returns one model or adapter."""
        key_of(gateway, request)
        return _described(gateway.model(name))


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/livez", tags=["health"], response_class=PlainTextResponse)
    async def livez() -> str:
        """Responds as long as the gateway runs."""
        return "ok"

    @app.get("/readyz", tags=["health"])
    async def readyz() -> JSONResponse:
        """Returns whether requests would be answered: 503 while a stage is down or draining."""
        models = {m.name: m.champion.is_ready for m in gateway.models.values()}
        engines = {m.name: m.champion.why for m in gateway.models.values()}
        state = {"ready": gateway.is_ready, "draining": gateway.is_draining, "models": models}
        state["engines"] = engines  # with the reason, e.g. why `auto` did not use a faster one
        return JSONResponse(state, 200 if gateway.is_ready else 503)

    @app.get("/version", tags=["health"])
    async def version() -> dict[str, Any]:
        """Returns the versions of code, packages, engines and artifacts."""
        environment = await asyncio.to_thread(_environment)
        return {
            "git": environment["git"],
            "packages": environment["packages"],
            "models": {
                model.name: {
                    "artifact": model.identity(model.champion)[1],
                    "engine": model.champion.engine.info.engine,
                }
                for model in (gateway.models | gateway.adapted).values()
            },
        }

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Returns all metrics in Prometheus' format."""
        gateway.refresh_metrics()
        return PlainTextResponse(
            gateway.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def add_error_handlers(app: FastAPI) -> None:
    """Gives every error OpenAI's shape."""

    @app.exception_handler(RequestError)
    async def unanswered(request: Request, error: RequestError) -> JSONResponse:
        return response_to(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return response_to(describe(error.errors()[0], error.body))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = str(error.detail)
        if text == _UNREADABLE:
            text = "the body is not valid JSON in UTF-8"
        status = error.status_code
        return JSONResponse(error_body(status, text), status, error.headers)


async def _respond(
    request: Request, generation: Generation, answer: Answer, is_stream: bool
) -> Response:
    chunks = generation.chunks()
    headers = {
        "x-request-id": generation.request.id,
        "x-artifact-version": generation.version,
    }
    if not is_stream:
        body = await _unless_gone(request, answer.whole(chunks))
        return JSONResponse(body, headers=headers)
    # The response starts after the first chunk, so that an error before it still has its status.
    first = await _unless_gone(request, anext(chunks))
    events = answer.events(_again(first, chunks))
    headers["cache-control"] = "no-cache"
    headers["x-accel-buffering"] = "no"  # otherwise nginx buffers the stream
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _again(first: tuple[int, TextChunk], rest: Chunks) -> Chunks:
    try:
        yield first
        async for item in rest:
            yield item
    finally:
        await rest.aclose()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Returns the result of some work, which is cancelled when the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(_CLOSED_REQUEST, "the client has disconnected")
        return task.result()
    finally:
        for future in (task, gone):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    # The body has been read by now, so the next message is the disconnect.
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _encoded(vector: list[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return vector
    return base64.b64encode(array.array("f", vector).tobytes()).decode()


def _described(model: Model | AdaptedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "spotforge",
        "parent": model.parent.name if isinstance(model, AdaptedModel) else None,
        "artifact": model.identity(model.champion)[1],
        "max_context": model.champion.engine.info.max_context,
    }
