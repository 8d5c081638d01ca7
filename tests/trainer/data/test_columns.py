"""One column is read, file by file, whatever else is in the files and whatever they are called."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import pytest

from core.errors import ConfigError
from trainer.data.config import SourceConfig, SourceKind
from trainer.data.files import FileDigests
from trainer.data.sources import open_source

ROWS = b'{"text": "one"}\n{"text": "two"}\n'
BOM = b"\xef\xbb\xbf"


def zstandard(content):
    target = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    return target.getvalue().to_pybytes()


def open_(tmp_path, path, kind="jsonl", begun_before=False, column=None):
    cfg = SourceConfig(kind=SourceKind[kind], path=str(path), column=column)
    digests = FileDigests(tmp_path / "digests.json", lambda: False)
    return open_source("data", cfg, digests, begun_before=begun_before)


def texts(tmp_path, path, kind="jsonl", **settings):
    return [d.text for d in open_(tmp_path, path, kind, **settings).documents()]


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


READ = {
    "extra columns": [lines({"text": "one"}), lines({"text": "two", "n": 1, "m": {"text": 3}})],
    "null, then a string": [lines({"text": "one", "s": None}), lines({"text": "two", "s": "web"})],
    "types that change": [lines({"text": "one", "s": 1}), lines({"text": "two", "s": ["x"]})],
    "no rows in one": [ROWS, b""],
    "a BOM": [BOM + ROWS],
    "CRLF": [ROWS.replace(b"\n", b"\r\n")],
    "CR": [ROWS.replace(b"\n", b"\r")],
    "no line end": [ROWS[:-1]],
    "null rows": [b"null\n" + ROWS],
    "blank lines": [b"\n  \n" + ROWS + b"\n\n"],
    "two in a line": [ROWS.replace(b"\n", b" ")],
    "a list": [b'[{"text": "one"}, {"text": "two"}]'],
    "a list over lines": [b'[\n {"text": "one"},\n {"text": "two"}\n]\n'],
    "objects over lines": [b'{\n "text": "one"\n}\n{\n "text": "two"\n}\n'],
    "numbers beyond a double": [b'{"text": "one", "x": 1e999, "y": NaN}\n{"text": "two"}'],
    "gzip of two members": [gzip.compress(ROWS[:16]) + gzip.compress(ROWS[16:])],
    "bzip2": [bz2.compress(ROWS)],
    "xz": [lzma.compress(ROWS)],
    "zstandard": [zstandard(ROWS)],
    "zstandard of two frames": [zstandard(ROWS[:16]) + zstandard(ROWS[16:])],
}


@pytest.mark.parametrize("files", READ.values(), ids=READ)
@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz"])  # content says what it is
def test_rows_are_read(tmp_path, files, extension):
    named = {f"{number}.{extension}": content for number, content in enumerate(files)}
    assert texts(tmp_path, write(tmp_path / "in", named)) == ["one", "two"]


def test_texts_stay_as_they_are_written(tmp_path):
    rows = ["2024-01-02", "12", "true", "a\u0000b", "\ufeffx", "\u2028", "é\r\n", '"text": "text"']
    path = write(tmp_path, {"a.jsonl": lines(*({"text": row} for row in rows))}) / "a.jsonl"
    assert texts(tmp_path, path) == [row for row in rows if row.strip()]


NAMES = ["a*b", "axxb", "part[1]", "x::y", "q?", "zip:::x", "#h", "sp ace", "new\nline", "a%20b"]


def test_file_names_are_no_patterns(tmp_path):
    names = sorted(NAMES)
    named = {f"{name}.jsonl": lines({"text": name}) for name in names}
    folder = write(tmp_path / "in", named)
    assert texts(tmp_path, folder) == names
    for name in names:
        assert texts(tmp_path, folder / f"{name}.jsonl") == [name]
    # The same files were read otherwise before: what was prepared of them is not found again.
    identity = open_(tmp_path, folder / "a*b.jsonl").identity
    assert identity != open_(tmp_path, folder / "a*b.jsonl", begun_before=True).identity
    identity = open_(tmp_path, folder / "axxb.jsonl").identity
    assert set(identity) == {"kind", "column", "files"}
    assert set(identity["files"][0]) == {"path", "size_bytes", "sha256"}


REFUSED = [
    (lines({"text": "a"}, {"text": 3}), "data.column", "int 3, not text, in line 2 of .*b.jsonl"),
    (lines({"txet": "a"}), "data.column", "no such column; there are txet .*b.jsonl"),
    (b'{"text": "a"}\n{"text": "b', "data.path", "b.jsonl: line 2 is not JSON"),
    (b'{"text": "a", "text": "b"}', "data.path", "b.jsonl: line 1 has the field text twice"),
    (b'{"text": "caf\xe9"}', "data.path", "b.jsonl: line 1 is not UTF-8"),
    (b'\n{"text": "\\ud800"}', "data.column", "surrogate pair, in line 2 of .*b.jsonl"),
    (ROWS.decode().encode("utf-16"), "data.path", "b.jsonl: is in UTF-16"),
    (ROWS + b"[1]", "data.path", "b.jsonl: line 3 is not a JSON object"),
    (b'[{"text": "a"},\n 7]', "data.path", "b.jsonl: line 2 is not a JSON object"),
    (b'[\n{"text": "a"}\n', "data.path", "b.jsonl: line 2 is not JSON"),
    (b'{"text": "a", "x": ' + b"[" * 9999 + b"]" * 9999 + b"}", "data.path", "b.jsonl: line 1"),
    (
        gzip.compress(ROWS * 99, mtime=0)[:-9],
        "data.path",
        "b.jsonl: cannot be read to its end: after line",
    ),
    (zstandard(ROWS * 99)[:-9], "data.path", "b.jsonl: cannot be read to its end: after line"),
]


@pytest.mark.parametrize("content, key, message", REFUSED)
def test_the_file_that_is_wrong_is_blamed(tmp_path, content, key, message):
    folder = write(tmp_path / "in", {"a.jsonl": ROWS, "b.jsonl": content, "c.jsonl": ROWS})
    with pytest.raises(ConfigError, match=message) as caught:
        texts(tmp_path, folder)
    assert caught.value.key == key and "\n" not in str(caught.value)


def test_rows_without_text_are_counted(tmp_path):
    rows = lines({"text": "a"}, {}, {"text": None}, {"text": " "}) + b"null\n"
    source = open_(tmp_path, write(tmp_path, {"a.jsonl": rows}) / "a.jsonl")
    assert [d.text for d in source.documents()] == ["a"]
    (note,) = source.notes
    assert note.startswith("4 of 5 rows")


def test_parquet_columns(tmp_path):
    column = pyarrow.array(["one", None, "two"])
    kinds = {
        "0": column,
        "1": pyarrow.array([], pyarrow.string()),
        "2": column.cast(pyarrow.large_string()),
        "3": pyarrow.array([None]),
        "4": column.dictionary_encode(),
        "lang=en/5": column,
    }
    for name, values in kinds.items():
        path = tmp_path / "in" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": values, name: values}), path)
    source = open_(tmp_path, tmp_path / "in", "parquet")
    assert [d.text for d in source.documents()] == ["one", "two"] * 4
    table = pyarrow.table({"text": ["a", "b"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "in" / "6.parquet")
    with pytest.raises(ConfigError, match="int 1, not text, in row 1 of .*6.parquet"):
        texts(tmp_path, tmp_path / "in" / "6.parquet", "parquet", column="n")
    pyarrow.parquet.write_table(table.rename_columns(["a", "n"]), tmp_path / "in" / "7.parquet")
    (tmp_path / "in" / "8.parquet").write_bytes(b"PAR1 is not all of it")
    with pytest.raises(ConfigError, match="no such column; there are a, n .*7.parquet"):
        texts(tmp_path, tmp_path / "in", "parquet")
    (tmp_path / "in" / "7.parquet").unlink()
    with pytest.raises(ConfigError, match="8.parquet: cannot be read"):
        texts(tmp_path, tmp_path / "in", "parquet")


def test_links(tmp_path):
    write(tmp_path / "else", {"b.jsonl": lines({"text": "b"})})
    folder = write(tmp_path / "in", {"a.jsonl": lines({"text": "a"})})
    (folder / "c.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "sub").symlink_to(tmp_path / "else")
    (folder / "loop").symlink_to(folder)
    assert texts(tmp_path, folder) == ["a", "a", "b"]
    assert texts(tmp_path, folder, begun_before=True) == ["a", "a"]
    for name in ("x.jsonl", "gone"):  # a file, and maybe a folder
        (folder / name).symlink_to(tmp_path / "nowhere")
    (folder / "other.bin").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="broken links: gone, x.jsonl;"):
        texts(tmp_path, folder)
    os.unlink(folder / "gone")
    with pytest.raises(ConfigError, match="broken links: x.jsonl;"):
        texts(tmp_path, f"{folder}/*.jsonl")
    with pytest.raises(ConfigError, match="broken links: x.jsonl;"):
        texts(tmp_path, folder / "x.jsonl")


def test_a_byte_order_mark_is_no_text(tmp_path):
    large = b"word " * 20_000
    files = {"a.txt": BOM + b"one", "b.txt": b"two", "c.txt": BOM, "d.txt": BOM + large}
    folder = write(tmp_path / "in", files)
    assert "".join(texts(tmp_path, folder, "text")) == "onetwo" + large.decode()
    before = texts(tmp_path, folder, "text", begun_before=True)
    assert before[:3] == ["\ufeffone", "two", "\ufeff"] and before[3].startswith("\ufeffword")
    now, old = (open_(tmp_path, folder, "text", begun_before=b).identity for b in (False, True))
    assert now != old and set(old) == {"kind", "files"}
    assert open_(tmp_path, folder / "b.txt", "text").identity["files"] == [old["files"][1]]
    assert set(open_(tmp_path, folder / "b.txt", "text").identity) == {"kind", "files"}


def test_a_digest_from_before_is_completed_not_computed_again(tmp_path, monkeypatch):
    folder = write(tmp_path / "in", {"a.txt": BOM + b"one", "b.txt": b"two"})

    def mark():
        digests = FileDigests(tmp_path / "digests.json", lambda: False)
        files = [digests.file("data", n, folder / n, is_text=True) for n in ("a.txt", "b.txt")]
        digests.save()
        return [file.has_bom for file in files]

    assert mark() == [True, False]
    known = json.loads((tmp_path / "digests.json").read_text())
    old = {path: entry[:4] for path, entry in known.items()}
    (tmp_path / "digests.json").write_text(json.dumps(old))
    monkeypatch.setattr(FileDigests, "_read", None)  # it would be called to hash a file
    assert mark() == [True, False]
    assert json.loads((tmp_path / "digests.json").read_text()) == known
