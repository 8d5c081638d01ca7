"""Turns pydantic's errors into the API's: field and rule in the words of the API."""

from __future__ import annotations

from typing import Any

from serving.errors import InvalidRequest
from serving.gateway.schema import Unsupported

# Fields of OpenAI's API that are accepted only with their default.
_UNSUPPORTED = {
    *Unsupported.model_fields,
    "annotations",
    "best_of",
    "dimensions",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "presence_penalty",
    "refusal",
    "suffix",
}
_KINDS = {
    "content": "a text, or parts of type text",
    "input": "a text, token ids, or a list of up to 2048 of either, none of them empty",
    "prompt": "a text, token ids, or a list of up to 128 of either, none of them empty",
    "stop": "a text, or up to 4 texts, of up to 512 characters each",
}
_AS_JSON = {"False": "false", "True": "true", "None": "null"}


def describe(error: dict[str, Any], body: Any) -> InvalidRequest:
    """Returns the error that names the field.

    Args:
        error: First error of pydantic's `errors()`.
        body: Body of the request.
    """
    if error["type"] == "json_invalid":
        return InvalidRequest("the body is not valid JSON")
    kind, (place, *where) = error["type"], error["loc"]
    # The location of a query parameter is not a path in the body.
    path = [str(x) for x in where] if place != "body" else _path(where, body, kind == "missing")
    field, param = path[-1] if path else "", ".".join(path)
    if not path and kind == "model_attributes_type":
        text = "the body must be a JSON object, sent with content-type: application/json"
        return InvalidRequest(text)
    if kind == "missing":
        rule = "is missing"
    elif kind == "extra_forbidden" or field in _UNSUPPORTED:
        rule = "is not supported; leave it out"
    elif path and (owner := next((name for name in reversed(path) if name in _KINDS), None)):
        rule = f"must be {_KINDS[owner]}"
    elif kind == "literal_error":
        expected = error["ctx"]["expected"]
        rule = f"must be {_AS_JSON.get(expected, expected)}"
    elif kind == "value_error":  # raised by our validators, whose text begins with the field
        text = str(error["ctx"]["error"])
        named = text.partition(" ")[0].rstrip(":")
        return InvalidRequest(text, param or named)
    elif kind in ("too_short", "too_long"):
        rule = f"must have {_bounds(error['ctx'])} items"
    elif kind in ("string_too_short", "string_too_long"):
        rule = f"must have {_bounds(error['ctx'])} characters"
    else:
        rule = error["msg"]
        rule = rule.replace("Input should be", "must be")
    return InvalidRequest(f"{param or 'the body'} {rule}", param or None)


def _bounds(told: dict[str, Any]) -> str:
    if "min_length" in told:
        return f"at least {told['min_length']}"
    return f"at most {told['max_length']}"


def _path(where: list[str | int], body: Any, is_missing: bool) -> list[str]:
    """Returns the path of the field, without the branches of unions that pydantic inserts."""
    path = []
    for i, part in enumerate(where):
        is_it = is_missing and i == len(where) - 1
        if isinstance(body, dict) and (part in body or is_it):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        path.append(str(part))
    return path
