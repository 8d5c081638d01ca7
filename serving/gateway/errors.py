"""Errors as HTTP responses in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from serving.errors import (
    Conflict,
    DeadlinePassed,
    Forbidden,
    InvalidRequest,
    LimitReached,
    NotFound,
    RequestError,
    RequestFailed,
    Unauthorized,
    Unavailable,
)

_STATUS: dict[type[RequestError], int] = {
    InvalidRequest: 400,
    Unauthorized: 401,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    LimitReached: 429,
    RequestFailed: 500,
    Unavailable: 503,
    DeadlinePassed: 504,
}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    504: "timeout_error",
}
_HEADERS = {
    401: {"www-authenticate": "Bearer"},
    500: {"x-should-retry": "false"},  # by default OpenAI's clients retry a 500 twice
}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Returns the body of an error in OpenAI's shape."""
    kind = _TYPES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: RequestError) -> dict[str, Any]:
    """Returns the body of the response to a request that is not answered."""
    return error_body(_STATUS[type(error)], str(error), error.param, error.code)


def response_to(error: RequestError) -> JSONResponse:
    """Returns the response to a request that is not answered, with `Retry-After` if it may be."""
    status, retry_s = _STATUS[type(error)], error.retry_after_s
    headers = {} if retry_s is None else {"retry-after": str(retry_s)}
    return JSONResponse(body_of(error), status, headers | _HEADERS.get(status, {}))
