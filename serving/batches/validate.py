"""Checks the input file of a batch line by line before any line runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

_MAX_PROBLEMS = 100  # the check ends after so many
_MAX_ID = 512


class Problem(NamedTuple):
    """A problem in an input file.

    Attributes:
        code: Error code, for programs.
        message: Error in one line, for people.
        line: Number of the line, from 1; None: the whole file.
        param: Field of the line; None: the whole line.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None


def check_file(path: Path, endpoint: str, max_lines: int) -> tuple[list[int], list[Problem]]:
    """Reads and checks all lines; empty lines are skipped.

    Args:
        path: Path of the input file.
        endpoint: Endpoint that every line must have.
        max_lines: Lines of the file, at most.

    Returns:
        The offset of each line in bytes, and the problems.
    """
    offsets: list[int] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, offset, line in _lines(path):
        offsets.append(offset)
        # Ends here: a file of any size must not fill the memory with offsets.
        if len(offsets) > max_lines:
            text = f"the file has more than {max_lines} lines"
            return offsets, [*problems, Problem("too_many_lines", text)]
        try:
            request = parse(line)
            _check(request, endpoint)
        except _LineError as e:
            problems.append(Problem(e.code, e.message, number, e.param))
        else:
            first = seen.setdefault(request["custom_id"], number)
            if first != number:
                text = f"line {first} has the same custom_id"
                problems.append(Problem("duplicate_custom_id", text, number, "custom_id"))
        if len(problems) >= _MAX_PROBLEMS:
            break
    if not offsets:
        problems.append(Problem("empty_file", "the file has no lines"))
    return offsets, problems


def parse(line: bytes) -> Any:
    """Returns the JSON of a line.

    Raises:
        _LineError: The line is not valid JSON.
    """
    try:
        return json.loads(line.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        raise _LineError("invalid_json_line", f"the line is not valid JSON: {e}", None) from e


class _LineError(Exception):
    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def _check(request: Any, endpoint: str) -> None:
    if not isinstance(request, dict):
        raise _LineError("invalid_request", "the line is not a JSON object", None)
    keys = {"custom_id", "method", "url", "body"}
    if request.keys() != keys:
        odd = min(request.keys() ^ keys)
        text = "is missing" if odd in keys else "is not a field of a line"
        # `ascii`, since an unpaired surrogate in the name could not be sent to the client.
        raise _LineError("invalid_request", f"{ascii(odd[:64])} {text}", None)
    custom_id = request["custom_id"]
    if not (isinstance(custom_id, str) and 0 < len(custom_id) <= _MAX_ID):
        text = f"custom_id must be a text of 1 to {_MAX_ID} characters"
        raise _LineError("invalid_request", text, "custom_id")
    if request["method"] != "POST":
        raise _LineError("invalid_method", "method must be POST", "method")
    if request["url"] != endpoint:
        raise _LineError("mismatched_url", f"url must be the batch's endpoint {endpoint}", "url")
    if not isinstance(request["body"], dict):
        raise _LineError("invalid_request", "body must be a JSON object", "body")
    if request["body"].get("stream"):
        raise _LineError("invalid_request", "body.stream must be false", "body.stream")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")
