"""Calls of functions out of a model's text, as Hermes' and Qwen's templates have them.

<tool_call>
{"name": "weather", "arguments": {"city": "Pune"}}
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

OPENS, CLOSES = "<tool_call>", "</tool_call>"


class ToolCallParser:
    """Splits a text that comes in pieces into what is said and what is called."""

    def __init__(self) -> None:
        self._held = ""
        self._is_inside = False

    def feed(self, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """What is said, and the calls that are complete.

        Args:
            text: The next piece.
            is_last: There is no more: what was held back is told as text.

        Returns:
            Text, and `{"name": ..., "arguments": JSON text}` for each call.
        """
        self._held += text
        said, calls = "", []
        while True:
            mark = CLOSES if self._is_inside else OPENS
            before, found, after = self._held.partition(mark)
            if not found:
                break
            if self._is_inside:
                call = _parse(before)
                if call is None:
                    said += OPENS + before + CLOSES  # no call, so the client is to see it
                else:
                    calls.append(call)
            else:
                said += before
            self._held, self._is_inside = after, not self._is_inside
        if is_last:
            said += (OPENS if self._is_inside else "") + self._held
            self._held = ""
        elif not self._is_inside:
            keep = next(
                (n for n in range(len(OPENS) - 1, 0, -1) if self._held.endswith(OPENS[:n])), 0
            )
            said += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        return said, calls


class WholeCall:
    """A text that is one call and nothing else, as `call_schema` has it."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """See `ToolCallParser`; a call that was cut off is told as text."""
        self._held += text
        if not is_last:
            return "", []
        call = _parse(self._held)
        return (self._held, []) if call is None else ("", [call])


def call_schema(functions: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """A JSON schema of a call of one of some functions.

    Args:
        functions: At least one: their parameters' schemas, by name; None: any object.
    """
    calls, definitions = [], {}
    for number, (name, parameters) in enumerate(functions.items()):
        # Its references begin at its own root, which is another one here.
        root = f"#/$defs/{number}"
        definitions[str(number)] = _moved(parameters or {"type": "object"}, root)
        properties = {"name": {"const": name}, "arguments": {"$ref": root}}
        call = {"type": "object", "properties": properties, "required": list(properties)}
        calls.append(call | {"additionalProperties": False})
    return (calls[0] if len(calls) == 1 else {"anyOf": calls}) | {"$defs": definitions}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references begin elsewhere."""
    if isinstance(schema, list):
        return [_moved(inner, root) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved


def call_of(described: Any) -> dict[str, Any] | None:
    """A call out of an object that describes it; None: it is none."""
    if not isinstance(described, dict) or not isinstance(described.get("name"), str):
        return None
    arguments = described.get("arguments", described.get("parameters"))
    if arguments is None:
        return None
    return {
        "name": described["name"],
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
    }


def _parse(text: str) -> dict[str, Any] | None:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(described, dict) and "parameters" not in described:
        described = {"arguments": {}, **described}  # a function without any may be called so
    return call_of(described)
