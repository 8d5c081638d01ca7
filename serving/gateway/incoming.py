"""Reads from an HTTP request what is asked, and by whom."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from starlette.requests import Request

from serving.admission import Priority
from serving.batches.ask import OWNER
from serving.errors import InvalidRequest
from serving.gateway.gateway import Gateway
from serving.gateway.request import InferenceRequest
from serving.gateway.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from serving.keys import Key
from serving.text.codec import Chat

_TIMEOUT_HEADER = "x-request-timeout"
_PRIORITY_HEADER = "x-priority"
_DAY_S = 86_400.0


def key_of(gateway: Gateway, http: Request) -> Key:
    """Returns the key of an HTTP request; raises Unauthorized if it has no valid one."""
    return gateway.authorize(http.headers.get("authorization"), http.scope.get(OWNER))


def request_of(
    gateway: Gateway,
    http: Request,
    body: CompletionRequest | ChatRequest | EmbeddingRequest,
    prompts: Sequence[str | list[int] | Chat],
) -> InferenceRequest:
    """Returns what an HTTP request asks of a model.

    Args:
        gateway: State of the server.
        http: Request with its headers.
        body: Body of the request.
        prompts: Prompts of the body.

    Raises:
        Unauthorized: The request has no valid key.
        NotFound: There is no such model.
        InvalidRequest: A header is not valid.
    """
    request = InferenceRequest(
        key=key_of(gateway, http),
        model=gateway.model(body.model),
        deadline_s=min(_timeout_s(http), gateway.config.admission.request_timeout_s),
        priority=_priority(http),
        prompts=prompts,
        prompts_field=body.prompts_field,
    )
    if isinstance(body, EmbeddingRequest):
        return request
    return dataclasses.replace(
        request,
        max_tokens=body.limit(),
        max_tokens_field=body.limit_field(),
        default_max_tokens=body.default_limit,
        sampling=body.sampling(),
        n=body.num_choices(),
        seed=body.seed,
        logprobs=body.num_logprobs(),
        stop=body.stops(),
        ignore_eos=bool(body.ignore_eos),
        schema=body.schema_of_text(),
        schema_field=body.schema_field(),
    )


def _timeout_s(http: Request) -> float:
    """Returns the seconds after which the client needs no response; inf if it does not say."""
    asked = http.headers.get(_TIMEOUT_HEADER)
    if asked is None:
        return math.inf
    try:
        seconds = float(asked)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < _DAY_S:
        text = f"{_TIMEOUT_HEADER} must be a number of seconds, above 0 and below {_DAY_S:g}"
        raise InvalidRequest(text, _TIMEOUT_HEADER)
    return seconds


def _priority(http: Request) -> Priority:
    name = http.headers.get(_PRIORITY_HEADER, Priority.interactive.name)
    if name not in Priority.__members__:
        text = f"{_PRIORITY_HEADER} must be one of {', '.join(Priority.__members__)}"
        raise InvalidRequest(text, _PRIORITY_HEADER)
    return Priority[name]
