"""Prepares messages of a conversation for chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message with its parts joined and the arguments of calls parsed from JSON.

    Args:
        message: Message as in OpenAI's API: `role`, `content` and optionally `tool_calls`. Other
            fields are kept.

    Raises:
        ValueError: The content is missing or is not text.
    """
    calls = message.get("tool_calls")
    if message.get("content") is None and not calls:
        raise ValueError("content is missing: only an assistant that calls tools may omit it")
    result = dict(message) | {"content": text_of(message.get("content"))}
    if message["role"] == "developer":
        result["role"] = "system"
    if calls:
        result["tool_calls"] = [_with_object(call) for call in calls]
    return result


def text_of(content: object) -> str:
    """Returns a message's content as one text, with newlines between its parts.

    Args:
        content: Text, a list of `{"type": "text", "text": ...}`, or None.

    Raises:
        ValueError: The content has another type.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f"content is a {type(content).__name__}, not text or a list of parts")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"content has a part of type {kind}; only text is supported")
        if not isinstance(part.get("text"), str):
            raise ValueError("content has a part of type text without the field `text`")
        texts.append(part["text"])
    return "\n".join(texts)


def _with_object(call: Any) -> Any:
    """Returns a call whose arguments are an object, which a template can iterate over."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(function["arguments"] or "{}")  # some clients send "" for no arguments
    except ValueError as e:
        raise ValueError(f"the arguments of a call are not JSON: {e}") from e
    return call | {"function": function | {"arguments": parsed}}
