"""Parses calls of functions in the format of Hermes' and Qwen's chat templates.

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
    """Parser that splits a text that comes in pieces into text and calls."""

    def __init__(self) -> None:
        self._held = ""
        self._is_inside = False

    def feed(self, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Returns the text that is final, and the calls that are complete.

        Args:
            text: Next piece.
            is_last: True: there are no more pieces, so text that was held back is returned.

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
                    said += OPENS + before + CLOSES  # not a call, so it is part of the text
                else:
                    calls.append(call)
            else:
                said += before
            self._held, self._is_inside = after, not self._is_inside
        if is_last:
            said += (OPENS if self._is_inside else "") + self._held
            self._held = ""
        elif not self._is_inside:
            # A possible beginning of the mark is held back.
            keep = next(
                (n for n in range(len(OPENS) - 1, 0, -1) if self._held.endswith(OPENS[:n])), 0
            )
            said += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        return said, calls


class WholeCall:
    """Parser of a text that is one call and nothing else, as `call_schema` requires."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """See `ToolCallParser`; a call that was cut off is returned as text."""
        self._held += text
        if not is_last:
            return "", []
        call = _parse(self._held)
        return (self._held, []) if call is None else ("", [call])


def call_schema(functions: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Returns the JSON schema of a call of one of several functions.

    Args:
        functions: Schemas of the parameters by function name, at least one; None: any object.
    """
    calls, definitions = [], {}
    for number, (name, parameters) in enumerate(functions.items()):
        # A function's schema becomes a definition, so its references need a new root.
        root = f"#/$defs/{number}"
        definitions[str(number)] = _moved(parameters or {"type": "object"}, root)
        properties = {"name": {"const": name}, "arguments": {"$ref": root}}
        call = {"type": "object", "properties": properties, "required": list(properties)}
        calls.append(call | {"additionalProperties": False})
    return (calls[0] if len(calls) == 1 else {"anyOf": calls}) | {"$defs": definitions}


def _moved(schema: Any, root: str) -> Any:
    """Returns a schema with all references moved to another root."""
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
    """Returns the call that an object describes; None: the object is not a call."""
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
        described = {"arguments": {}, **described}  # models leave out empty arguments
    return call_of(described)
