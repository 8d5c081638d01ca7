"""What documents each kind of source gives, and what is said of one that cannot be used."""

import gzip
import json
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from core.errors import ConfigError, Interrupted
from core.settings.rules import check_settings
from trainer.data.config import SourceConfig, SourceKind
from trainer.data.files import FileDigests
from trainer.data.sources import check_keys, open_source


def open_(tmp_path, kind, **settings):
    cfg = SourceConfig(kind=SourceKind[kind], **settings)
    check_keys("data", cfg)
    return open_source("data", cfg, FileDigests(tmp_path / "digests.json", lambda: False))


def documents(tmp_path, kind, **settings):
    return [document.text for document in open_(tmp_path, kind, **settings).documents()]


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_standard_library_without_its_tests(tmp_path):
    source = open_(tmp_path, "stdlib")
    names = [file["path"] for file in source.identity["files"]]
    assert {"argparse.py", "asyncio/events.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names) and source.size_bytes > 5e6
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"site-packages", "test", "tests", "__pycache__", "idle_test"}
    library = Path(sysconfig.get_path("stdlib"))
    wanted = [text for name in names if (text := (library / name).read_bytes().decode()).strip()]
    assert [document.text for document in source.documents()] == wanted


def test_files_folder_and_glob(tmp_path):
    for name in ("a.txt", "b/c.md", "b/d.bin", ".git/e.txt", "b/empty.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if "empty" in name else f"{name}\r\n")
    root = str(tmp_path / "in")
    assert documents(tmp_path, "text", path=root) == ["a.txt\r\n", "b/c.md\r\n"]
    assert documents(tmp_path, "text", path=f"{root}/b/d.bin") == ["b/d.bin\r\n"]
    source = open_(tmp_path, "text", path=f"{root}/**/*.md")
    assert [file["path"] for file in source.identity["files"]] == ["b/c.md"]


def test_a_large_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraph = "wörter und wörter\r\n" * 50 + "\r\n"
    unbroken = "x" * 100_000
    text = paragraph * 200 + unbroken + "\n" + "line\n" * 20_000
    (tmp_path / "book.txt").write_bytes(text.encode())
    pieces = documents(tmp_path, "text", path=str(tmp_path / "book.txt"))
    assert "".join(pieces) == text
    assert all(16_000 <= len(piece) <= 3 * 16_384 for piece in pieces[:-1])
    assert pieces[0].endswith("\r\n\r\n")


def test_json_lines_and_parquet(tmp_path):
    rows = [{"text": "one", "n": 1}, {"text": ""}, {"n": 3}, {"text": "two"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert documents(tmp_path, "jsonl", path=path) == ["one", "two"]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}\n')
    both = documents(tmp_path, "jsonl", path=str(tmp_path))
    assert both == ["one", "two", "three"]
    path = write_parquet(tmp_path / "c.parquet", {"body": ["x", None, "y"], "n": [1, 2, 3]})
    assert documents(tmp_path, "parquet", path=path, column="body") == ["x", "y"]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_reads_a_local_folder(tmp_path, streaming):
    (tmp_path / "repo").mkdir()
    write_lines(tmp_path / "repo" / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    settings = {"path": str(tmp_path / "repo"), "streaming": streaming}
    assert documents(tmp_path, "hub", **settings) == ["one", "two"]
    with pytest.raises(ConfigError, match="data.path=.*test"):
        documents(tmp_path, "hub", **settings, split="test")
    with pytest.raises(ConfigError, match="data.revision=main: has no effect"):
        open_(tmp_path, "hub", **settings, revision="main")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_local_folder_that_differ_in_columns_have_a_kind_that_reads_them(
    tmp_path, streaming
):
    folder = tmp_path / "repo"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [{"text": "one", "a": 1}])
    write_lines(folder / "b.jsonl", [{"text": "two", "b": "x"}])
    with pytest.raises(ConfigError) as refused:
        documents(tmp_path, "hub", path=str(folder), streaming=streaming)
    assert refused.value.key == "data.path" and "data=jsonl" in refused.value.fix
    assert documents(tmp_path, "jsonl", path=str(folder)) == ["one", "two"]


def test_hub_is_pinned_at_the_commit_of_today(tmp_path, monkeypatch):
    lfs = SimpleNamespace(sha256="ab" * 32)
    siblings = [
        SimpleNamespace(rfilename="data/1.parquet", size=7, lfs=lfs, blob_id="c" * 40),
        SimpleNamespace(rfilename="README.md", size=3, lfs=None, blob_id="d" * 40),
    ]
    calls = {}

    def dataset_info(self, path, **options):
        calls["info"] = (path, options)
        return SimpleNamespace(sha="e" * 40, siblings=siblings)

    def load_dataset(path, **options):
        calls["load"] = (path, options)
        return datasets.Dataset.from_dict({"text": ["hello"]})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_(tmp_path, "hub", path="org/name", revision="main", subset="en")
    assert [document.text for document in source.documents()] == ["hello"]
    assert calls["info"] == ("org/name", {"revision": "main", "files_metadata": True})
    assert calls["load"][1]["revision"] == source.identity["commit"] == "e" * 40
    assert calls["load"][1]["name"] == "en"
    assert source.identity["files"] == [
        {"path": "README.md", "size_bytes": 3, "sha256": f"git:{'d' * 40}"},
        {"path": "data/1.parquet", "size_bytes": 7, "sha256": "ab" * 32},
    ]


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(ConfigError, match="data.path=org/name: no such local folder.*offline"):
        open_(tmp_path, "hub", path="org/name")


BAD_KEYS = [
    ("stdlib", {"path": "x"}, "data.path=x: has no effect with kind=stdlib"),
    ("text", {"path": "x", "column": "c"}, "data.column=c: has no effect with kind=text"),
    ("jsonl", {"path": "x", "subset": "s"}, "data.subset=s: has no effect with kind=jsonl"),
    ("parquet", {"path": "x", "revision": "r"}, "data.revision=r: has no effect"),
    ("parquet", {"path": "x", "split": "s"}, "data.split=s: has no effect"),
    ("tokens", {"path": "x", "streaming": True}, "data.streaming=True: has no effect"),
    ("text", {}, "data.path=None: kind=text needs it"),
    ("tokens", {"path": ""}, "data.path=: kind=tokens needs it"),
    ("text", {"path": "x", "weight": 0.0}, "data.weight=0.0"),
    ("text", {"path": "x", "weight": -1.0}, "data.weight=-1.0"),
    ("text", {"path": "x", "weight": float("nan")}, "data.weight=nan"),
]


@pytest.mark.parametrize("kind, settings, message", BAD_KEYS)
def test_keys_without_effect_or_sense(kind, settings, message):
    source = SourceConfig(kind=SourceKind[kind], **settings)
    with pytest.raises(ConfigError, match=message):
        check_settings(source, "data")
        check_keys("data", source)


BAD_FILES = [
    ("text", "missing", None, "no such file or folder"),
    ("text", "*.nothing", None, "the glob matches no file"),
    ("text", "empty.txt", b"", "is empty"),
    ("jsonl", "empty.jsonl", b"", "is empty"),
    ("parquet", "empty.parquet", b"", "is empty"),
    ("text", "binary", b"abc\0def", "byte 3 is a NUL byte"),
    ("text", "latin.txt", "naïve".encode("latin-1"), "byte 2 is not UTF-8"),
    ("text", "cut.txt", "naï".encode()[:-1], "byte 2 is not UTF-8"),
    ("jsonl", "bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    ("jsonl", "row.jsonl", b'{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
    ("jsonl", "none.jsonl", b'{"a": "x", "b": "y"}\n', "no such column; there are a, b"),
    ("jsonl", "null.jsonl", b'{"text": ""}\n{"text": null}\n', "the column is empty in every row"),
    ("jsonl", "number.jsonl", b'{"text": 7}\n', "holds int 7, not text"),
    ("parquet", "bad.parquet", b"not parquet at all", "ArrowInvalid"),
]


@pytest.mark.parametrize("kind, name, content, message", BAD_FILES)
def test_files_that_cannot_be_used(tmp_path, kind, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        documents(tmp_path, kind, path=str(tmp_path / name))
    assert caught.value.key in ("data.path", "data.column")
    assert "column" in message or "holds" in message or name in str(caught.value)


def test_a_bad_byte_beyond_a_chunk_border_is_placed_right(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.files.CHUNK_BYTES", 5)
    (tmp_path / "a.txt").write_bytes("é".encode() * 6)  # characters cut by borders are fine
    assert documents(tmp_path, "text", path=str(tmp_path / "a.txt")) == ["éééééé"]
    (tmp_path / "b.txt").write_bytes("é".encode() * 6 + "é".encode()[:1] + b"x")
    with pytest.raises(ConfigError, match="byte 12 is not UTF-8"):
        documents(tmp_path, "text", path=str(tmp_path / "b.txt"))


def test_a_folder_or_column_of_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_text("x")
    with pytest.raises(ConfigError, match="holds no file ending in .txt"):
        documents(tmp_path, "text", path=str(tmp_path / "in"))
    path = write_parquet(tmp_path / "a.parquet", {"a": ["x"], "b": [1]})
    with pytest.raises(ConfigError, match=r"data\.column=text: no such column; there are a, b"):
        documents(tmp_path, "parquet", path=path)
    with pytest.raises(ConfigError, match=r"data\.column=b: holds int 1, not text"):
        documents(tmp_path, "parquet", path=path, column="b")


def test_digests_of_unchanged_files_are_remembered(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    reads = []
    read = FileDigests._read
    monkeypatch.setattr(FileDigests, "_read", lambda *a: reads.append(a[2]) or read(*a))

    def digest(is_text=True):
        digests = FileDigests(tmp_path / "digests.json", lambda: False)
        file = digests.file("data", "a.txt", path, is_text=is_text)
        digests.save()
        return file.sha256

    assert digest() == digest() and len(reads) == 1
    path.write_text("three")
    assert digest() == digest() and len(reads) == 2
    digest(is_text=False)  # a digest that came without the check does not stand for one with it
    digest(is_text=True)
    assert len(reads) == 4


def test_hashing_stops_when_told(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    digests = FileDigests(tmp_path / "digests.json", lambda: True)
    with pytest.raises(Interrupted):
        digests.file("data", "a.txt", tmp_path / "a.txt", is_text=True)
