"""Rows of jsonl and parquet files, streamed through `datasets`, and the text in them.

`datasets` is imported inside the functions: a start on data that is already prepared never needs
it.
"""

import json
from collections.abc import Iterator
from typing import Any

from monitoring.errors import ConfigError

ROWS_PER_READ = 256


def table_texts(key: str, kind: str, paths: list[str], column: str) -> Iterator[str]:
    """The text column of local files, row by row, in constant memory.

    Args:
        key: Configuration key of the source.
        kind: `jsonl` or `parquet`.
        paths: Files, in the order to read them.
        column: Field that holds the text.

    Raises:
        ConfigError: No such column, no text in it, or a file that cannot be parsed.
    """
    import datasets  # type: ignore[import-untyped]

    loader, options = "json", {}
    if kind == "parquet":
        _check_parquet(key, paths, column)
        loader, options = "parquet", {"columns": [column]}
    try:
        rows = datasets.load_dataset(
            loader, data_files=paths, split="train", streaming=True, **options
        )
        yield from column_texts(key, rows, column)
    except _parse_errors() as error:
        if kind == "jsonl":
            _check_json_lines(key, paths)
        raise ConfigError(f"{key}.path", paths[0], one_line(error), "fix the files") from error


def column_texts(key: str, rows: Any, column: str) -> Iterator[str]:
    """The non-empty texts of one column.

    Args:
        key: Configuration key of the source.
        rows: A `datasets.Dataset` or `IterableDataset`.
        column: Field that holds the text.

    Raises:
        ConfigError: No such column, something else than text in it, or nothing in any row.
    """
    num_texts = 0
    for batch in rows.iter(batch_size=ROWS_PER_READ):
        check_column(key, list(batch), column)
        for text in batch[column]:
            if text is not None and not isinstance(text, str):
                rule = f"holds {type(text).__name__} {text!r:.40}, not text"
                raise ConfigError(f"{key}.column", column, rule, "name a column of strings")
            if text and text.strip():
                num_texts += 1
                yield text
    if not num_texts:
        rule = "the column is empty in every row"
        raise ConfigError(f"{key}.column", column, rule, "name the column that holds the text")


def check_column(key: str, columns: list[str], column: str) -> None:
    """Raises ConfigError, listing the columns there are, when `column` is not among them."""
    if column not in columns:
        rule = f"no such column; there are {', '.join(sorted(columns))}"
        raise ConfigError(f"{key}.column", column, rule, "name the column that holds the text")


def one_line(error: BaseException) -> str:
    """A library's error, on one line and not longer than a screen."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _parse_errors() -> tuple[type[Exception], ...]:
    import pyarrow  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
    from datasets.packaged_modules.json.json import (  # type: ignore[import-untyped]
        FullReadDisallowed,
    )

    return (DatasetsError, FullReadDisallowed, pyarrow.ArrowException, ValueError, TypeError)


def _check_parquet(key: str, paths: list[str], column: str) -> None:
    import pyarrow
    import pyarrow.parquet  # type: ignore[import-untyped]

    for path in paths:
        try:
            names = pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError) as error:
            fix = "give a parquet file"
            raise ConfigError(f"{key}.path", path, one_line(error), fix) from error
        check_column(key, names, column)


def _check_json_lines(key: str, paths: list[str]) -> None:
    """Called when reading failed: find the line that made it fail."""
    import fsspec  # type: ignore[import-untyped]

    for path in paths:
        with fsspec.open(path, "rb", compression="infer") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    is_row = not line.strip() or isinstance(json.loads(line), dict)
                except ValueError as error:
                    rule = f"line {number} is not JSON ({one_line(error)})"
                    raise ConfigError(f"{key}.path", path, rule, "fix that line") from error
                if not is_row:
                    rule = f"line {number} is not a JSON object"
                    fix = 'write one {"text": ...} a line'
                    raise ConfigError(f"{key}.path", path, rule, fix)
