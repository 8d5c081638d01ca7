"""Formats in which families of models write calls of functions, found by the chat template."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

from serving.text.tools import ToolCallParser, call_of

Call = dict[str, Any]

_JSON = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s;,]*")  # separators between two calls
# The call that Llama's templates show as an example: {"name": function name, "parameters": ...}.
# The description of a function has its "description" in between, and does not match.
_LLAMA_JSON = re.compile(r'\{"name"\s*:(?:(?!description).){0,200}?"parameters"\s*:', re.DOTALL)
_PYTHONIC = re.compile(r"\[\w+\(\w+=")
_OTHER_TAGS = ("<function=", "<arg_key>")  # formats within <tool_call> that are not JSON
_LLAMA_MARKS = ("<|python_tag|>", "<|python_start|>", "<|python_end|>")
_LLAMA_BEGINS = re.compile(r'\s*(\{\s*("|$)|\[\s*(\{|$|[A-Za-z_][\w.]*(\(|$))|$)')
_MISTRAL_MARK = "[TOOL_CALLS]"
_MISTRAL_CALL = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_PYTHON_NAMES = {"true": True, "false": False, "null": None}


class CallParser(Protocol):
    """Parser that finds calls in one text."""

    def feed(self, text: str, is_last: bool) -> tuple[str, list[Call]]:
        """See `ToolCallParser.feed`."""
        ...


class CallFormat(NamedTuple):
    """Format of calls of a family of models.

    Attributes:
        marks: Texts that mark calls; those that are special tokens must be kept in the text.
        parser: Function that returns a parser, given the names of the functions.
        has_short_ids: True: templates accept only ids of nine letters and digits.
    """

    marks: Sequence[str]
    parser: Callable[[Collection[str]], CallParser]
    has_short_ids: bool = False


def format_of(template: str) -> CallFormat | None:
    """Returns the format that a chat template uses; None: a format that is not supported."""
    if _MISTRAL_MARK in template:
        return CallFormat((_MISTRAL_MARK, "[CALL_ID]", "[ARGS]"), MistralCalls, True)
    if "<tool_call>" in template:
        is_json = not any(tag in template for tag in _OTHER_TAGS)
        marks = ("<tool_call>", "</tool_call>")
        return CallFormat(marks, lambda names: ToolCallParser()) if is_json else None
    shows = _LLAMA_JSON.search(template) or _PYTHONIC.search(template)
    if shows or any(mark in template for mark in _LLAMA_MARKS):
        return CallFormat(_LLAMA_MARKS, LlamaCalls)
    return None


class LlamaCalls:
    """Parser of Llama's calls.

    Llama 3 writes `{"name": "f", "parameters": {"x": 1}}`, Llama 4 `[f(x=1), g()]` or the same
    JSON. Apart from text before a mark, a text consists of calls only, or of none. Several objects
    are separated by a semicolon or by nothing.

    Args:
        names: Names of the functions; a list in square brackets with other names is not a call.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._is_said = False  # the text has begun with something that is not a call

    def feed(self, text: str, is_last: bool) -> tuple[str, list[Call]]:
        """See `ToolCallParser.feed`."""
        self._held += text
        first = min((at for m in _LLAMA_MARKS if (at := self._held.find(m)) >= 0), default=-1)
        said = ""
        # Text before a mark is shown, unless it may itself be the beginning of a call.
        if first > 0 and (self._is_said or not _LLAMA_BEGINS.match(self._held[:first])):
            said, self._held, first = self._held[:first], self._held[first:], 0
        keep = 0 if is_last else _partial(self._held, _LLAMA_MARKS)
        before = self._held[: len(self._held) - keep]
        if first < 0 and (self._is_said or not _LLAMA_BEGINS.match(before)):
            self._is_said = True
            said, self._held = before, self._held[len(before) :]
        if not is_last:
            return said, []
        calls = self._calls(self._held)
        return (said + self._held, []) if calls is None else (said, calls)

    def _calls(self, text: str) -> list[Call] | None:
        for mark in _LLAMA_MARKS:
            text = text.replace(mark, " ")
        text = text.strip()
        if not text:
            return None
        return _json_calls(text) or _python_calls(text, self._names)


class MistralCalls:
    """Parser of Mistral's calls: `[TOOL_CALLS]`, then a list of objects or `name[ARGS]{...}`.

    Newer models write the second form.

    Args:
        names: Not used, since only calls begin with the mark.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._held = ""

    def feed(self, text: str, is_last: bool) -> tuple[str, list[Call]]:
        """See `ToolCallParser.feed`."""
        self._held += text
        said, mark, _ = self._held.partition(_MISTRAL_MARK)
        if not mark:
            keep = 0 if is_last else _partial(self._held, [_MISTRAL_MARK])
            said = self._held[: len(self._held) - keep]
        self._held = self._held[len(said) :]
        if not is_last or not self._held:
            return said, []
        calls: list[Call] = []
        for part in self._held.split(_MISTRAL_MARK)[1:]:
            found = _mistral_calls(part)
            if found is None:
                said += _MISTRAL_MARK + part
            else:
                calls += found
        return said, calls


def _partial(text: str, marks: Sequence[str]) -> int:
    """Returns how many of a text's last characters may be the beginning of a mark."""
    for size in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


def _json_calls(text: str) -> list[Call] | None:
    """Returns the calls in a text of JSON objects or lists of them; None: it is another text."""
    calls: list[Call] = []
    at = 0
    while at < len(text):
        try:
            found, at = _JSON.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        for described in found if isinstance(found, list) else [found]:
            if (call := call_of(described)) is None:
                return None
            calls.append(call)
        gap = _BETWEEN.match(text, at)
        at = at if gap is None else gap.end()
    return calls


def _python_calls(text: str, names: Collection[str]) -> list[Call] | None:
    """Returns the calls in a text such as `[f(x=1), g()]`; None: it is another text.

    The text is parsed but never evaluated.
    """
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        calls = [(_name(node), _arguments(node)) for node in tree.elts]
        # Lists of other calls are ordinary text, such as an example of Python.
        if not all(name in names for name, _ in calls):
            return None
        return [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _name(node: ast.expr) -> str:
    if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
        raise ValueError("not a call with keyword arguments only")
    return ast.unparse(node.func)


def _arguments(node: ast.expr) -> dict[str, Any]:
    assert isinstance(node, ast.Call)
    return {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _PYTHON_NAMES:
        return _PYTHON_NAMES[node.id]
    return ast.literal_eval(node)


def _mistral_calls(text: str) -> list[Call] | None:
    named = _MISTRAL_CALL.match(text)
    if named is None:
        return _json_calls(text.strip()) or None
    try:
        arguments, end = _JSON.raw_decode(text, named.end())
    except (ValueError, RecursionError):
        return None
    if text[end:].strip():
        return None
    return [{"name": named[1], "arguments": json.dumps(arguments)}]
