"""A message of a conversation, as chat templates expect it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """One text instead of its parts, and arguments of calls as objects, not as JSON text.

    Args:
        message: As OpenAI's API has it: `role`, `content` and perhaps `tool_calls`. Other fields
            are kept.

    Raises:
        ValueError: It says nothing, or something that is no text.
    """
    calls = message.get("tool_calls")
    if message.get("content") is None and not calls:
        raise ValueError("content is missing: only an assistant that calls tools has none")
    result = dict(message) | {"content": text_of(message.get("content"))}
    if message["role"] == "developer":
        result["role"] = "system"
    if calls:
        result["tool_calls"] = [_with_object(call) for call in calls]
    return result


def text_of(content: object) -> str:
    """A message's content as one text: its parts, with a newline between two of them.

    Args:
        content: Text, a list of `{"type": "text", "text": ...}`, or None.

    Raises:
        ValueError: It is none of these.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f"content is a {type(content).__name__}, not text or a list of parts")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"content has a part of type {kind}; only text is understood")
        if not isinstance(part.get("text"), str):
            raise ValueError("content has a part of type text without a text")
        texts.append(part["text"])
    return "\n".join(texts)


def _with_object(call: Any) -> Any:
    """A call whose arguments a template can go through."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(function["arguments"] or "{}")  # none are sent as an empty text
    except ValueError as e:
        raise ValueError(f"the arguments of a call are no JSON: {e}") from e
    return call | {"function": function | {"arguments": parsed}}
