"""Reads the text column of jsonl and parquet files, and of a hub repository's rows.

Files are read one by one, and only the wanted column of each: other columns, and differences in
them between files, do not matter. pyarrow is imported inside the functions, because a start on
prepared data never needs it.
"""

from collections.abc import Iterator
from typing import Any

from core.errors import ConfigError
from trainer.data.json_lines import json_rows

ROWS_PER_READ = 256

# Location of a value, for errors, and the value; None if it is missing.
_Value = tuple[str, Any]


def table_texts(
    key: str, kind: str, paths: list[str], column: str, notes: list[str]
) -> Iterator[str]:
    """Yields the text column of local files, row by row, in constant memory.

    Args:
        key: Configuration key of the source.
        kind: Kind of the files, `jsonl` or `parquet`.
        paths: Files, in the order to read them.
        column: Field that contains the text.
        notes: List to which the number of skipped rows is added at the end.

    Raises:
        ConfigError: There is no such column or no text in it, or a file cannot be parsed; names
            the file and the line or row.
    """
    read = _json_values if kind == "jsonl" else _parquet_values
    values = (value for path in paths for value in read(key, path, column))
    return _texts(key, column, values, notes)


def column_texts(key: str, rows: Any, column: str, notes: list[str]) -> Iterator[str]:
    """Yields the non-empty texts of one column.

    Args:
        key: Configuration key of the source.
        rows: Rows as a `datasets.Dataset` or `IterableDataset`.
        column: Field that contains the text.
        notes: List to which the number of skipped rows is added at the end.

    Raises:
        ConfigError: There is no such column, a value that is not text, or no text in any row.
    """

    def values() -> Iterator[_Value]:
        num_rows = 0
        for batch in rows.iter(batch_size=ROWS_PER_READ):
            check_column(key, list(batch), column)
            for value in batch[column]:
                num_rows += 1
                yield f"row {num_rows}", value

    return _texts(key, column, values(), notes)


def check_column(key: str, columns: list[str], column: str, path: str | None = None) -> None:
    """Raises ConfigError, listing the existing columns, if `column` is not among them."""
    if column not in columns:
        where = "" if path is None else f" (in {path})"
        rule = f"no such column; there are {', '.join(sorted(columns)) or 'none'}{where}"
        raise ConfigError(f"{key}.column", column, rule, "name the column that contains the text")


def one_line(error: BaseException) -> str:
    """Returns a library's error on one line of at most 400 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _texts(key: str, column: str, values: Iterator[_Value], notes: list[str]) -> Iterator[str]:
    num_rows = num_texts = 0
    for where, value in values:
        num_rows += 1
        if value is None:
            continue
        if not isinstance(value, str):
            rule = f"holds {type(value).__name__} {value!r:.40}, not text, in {where}"
            raise ConfigError(f"{key}.column", column, rule, "name a column of strings")
        if not value.strip():
            continue
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"{value[error.start]!r}, half of a surrogate pair"
            rule = f"holds {half}, in {where}"
            raise ConfigError(f"{key}.column", column, rule, "write the whole pair") from error
        num_texts += 1
        yield value
    if not num_texts:
        rule = "the column is empty in every row" if num_rows else "there are no rows"
        raise ConfigError(f"{key}.column", column, rule, "name the column that contains the text")
    if num_texts < num_rows:
        left_out = f"{num_rows - num_texts:,} of {num_rows:,} rows"
        notes.append(f"{left_out} have no text in the column {column} and are skipped")


def _json_values(key: str, path: str, column: str) -> Iterator[_Value]:
    found, names = False, set[str]()
    for number, row in json_rows(f"{key}.path", path, column):
        if row is None or column not in row:
            names |= set() if found or row is None else row.keys()
            yield "", None
        else:
            found = True
            yield f"line {number} of {path}", row[column]
    # A file without the column is a wrong setting; a row without it is only skipped.
    if names and not found:
        check_column(key, list(names), column, path)


def _parquet_values(key: str, path: str, column: str) -> Iterator[_Value]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    num_rows = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check_column(key, names, column, path)
            if names.count(column) > 1:
                rule = f"{path} has {names.count(column)} columns of that name"
                raise ConfigError(f"{key}.column", column, rule, "write the file with one of them")
            for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=[column]):
                for value in batch.column(column).to_pylist():
                    num_rows += 1
                    yield f"row {num_rows} of {path}", value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        rule = f"cannot be read after row {num_rows} ({one_line(error)})"
        raise ConfigError(f"{key}.path", path, rule, "give a complete parquet file") from error
