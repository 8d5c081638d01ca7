"""Reads rows of JSON files: one object per line, with the number of its line.

They are parsed with `json` rather than a table reader. A table reader infers a type for every field
from the first rows and then refuses or converts later values, while only one field is needed here,
as text. Variants that other tools write are accepted: a list of objects, several objects in a line,
and objects that span several lines. Compression is detected by a file's first bytes, not its name.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from core.errors import ConfigError
from trainer.data.files import BOM, UTF_16_BOMS

_DECODER = json.JSONDecoder()
_BLANKS = " \t\r\n"


def json_rows(key: str, path: str, field: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields the rows of one file, in constant memory if each row has a line of its own.

    Args:
        key: Configuration key of the path, e.g. `data.path`.
        path: File, plain or compressed with gzip, bzip2, xz or zstandard.
        field: Field that is read from the rows; a row that has it twice is refused.

    Yields:
        Pairs (line number, row); the row is None for `null`.

    Raises:
        ConfigError: A line is not JSON, not an object or not UTF-8; names the file and the
            line.
    """
    # Parsing every row a second time for duplicate fields is slow, so only lines that contain the
    # name more than once are checked.
    quoted = json.dumps(field, ensure_ascii=False).encode()
    number = 0
    any_rows = False
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    if line.startswith(UTF_16_BOMS):
                        fix = "convert it to UTF-8"
                        raise ConfigError(key, path, "is in UTF-16, not in UTF-8", fix)
                    line = line.removeprefix(BOM)
                if not line.strip():
                    continue
                for at, row in _rows(key, path, number, line, None if any_rows else file):
                    if row is not None and not isinstance(row, dict):
                        fix = 'write one {"text": ...} a line'
                        raise ConfigError(key, path, f"line {at} is not a JSON object", fix)
                    any_rows = True
                    yield at, row
                if line.count(quoted) > 1 and _has_twice(line, field):
                    rule = f"line {number} has the field {field} twice"
                    raise ConfigError(key, path, rule, "remove one of them")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        rule = f"cannot be read to its end: after line {number}, {reason}"
        raise ConfigError(key, path, rule, "create the file again") from error


def _open(path: str) -> IO[bytes]:
    with open(path, "rb") as file:
        head = file.read(6)
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(path))
    if head.startswith(b"BZh"):
        return bz2.open(path)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(path)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # type: ignore[import-untyped]  # the standard library has zstd from 3.14 on

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return open(path, "rb")


def _rows(
    key: str, path: str, number: int, line: bytes, rest: IO[bytes] | None
) -> Iterator[tuple[int, Any]]:
    """Yields the values of a line, or of all lines if the first value spans several.

    Args:
        key: Configuration key of the path.
        path: Path of the file.
        number: Number of the line.
        line: Line that is not blank.
        rest: Remaining lines, into which the first row may extend; None for later rows.

    Yields:
        Pairs (line number, JSON value).
    """
    try:
        text = line.decode().rstrip(_BLANKS)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if rest is not None and error.pos >= len(text):
                text = f"{text}\n{rest.read().decode()}".rstrip(_BLANKS)
            for position, value in _values(text):
                yield number + text.count("\n", 0, position), value
        else:
            items = value if rest is not None and isinstance(value, list) else [value]
            for item in items:
                yield number, item
    except UnicodeDecodeError as error:
        rule = f"line {number} is not UTF-8 ({error.reason} at byte {error.start} of it)"
        raise ConfigError(key, path, rule, "convert the file to UTF-8 or leave it out") from error
    except json.JSONDecodeError as error:
        rule = f"line {number + error.lineno - 1} is not JSON ({error.msg}, column {error.colno})"
        raise ConfigError(key, path, rule, "fix that line") from error
    except (ValueError, RecursionError) as error:  # an int with too many digits, too deep nesting
        raise ConfigError(key, path, f"line {number}: {error}", "fix that line") from error


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """Yields (position, value) for consecutive values, or for the items of one list.

    Raises:
        json.JSONDecodeError: The text contains something else.
    """
    at = _after_blanks(text, 0)
    if listed := text.startswith("[", at):
        at = _after_blanks(text, at + 1)
    while at < len(text) and not (listed and text[at] == "]"):
        value, end = _DECODER.raw_decode(text, at)
        yield at, value
        at = _after_blanks(text, end)
        if listed and text.startswith(",", at):
            at = _after_blanks(text, at + 1)
    if listed:
        if at == len(text):
            raise json.JSONDecodeError("The list does not end", text, at)
        if (at := _after_blanks(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Something follows the list", text, at)


def _after_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANKS:
        at += 1
    return at


def _has_twice(line: bytes, field: str) -> bool:
    """Returns whether the outermost object in a line has a field twice."""
    names: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        names[:] = [name for name, _ in pairs]  # the outermost object is completed last

    try:
        json.loads(line, object_pairs_hook=keep)
    except ValueError:  # several objects in the line
        return False
    return names.count(field) > 1
