"""Folders and files are there whole or not at all, whenever their writer dies."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.folder import (
    HashedFile,
    LockHeldError,
    append_line,
    commit,
    digest_of,
    find_run,
    locked,
    manifest_of,
    read_json,
    remove_uncommitted,
    sha256_of,
    staged_file,
    staged_folder,
    staging_of,
    write_file,
    write_lineage,
    wrong_content,
    wrong_size,
)

ROOT = Path(__file__).parents[2]


# Dying at every call to the operating system that changes what is on the disk


def die_at(nth, writer):
    """Runs `writer` in a child that is gone, as by SIGKILL, at its nth such call.

    Returns whether it died; it did not where there are fewer calls.
    """

    def child():
        left = nth

        def count(call):
            def counted(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(137)
                return call(*args, **kwargs)

            return counted

        for name in ("fsync", "rename", "replace", "mkdir", "unlink"):
            setattr(os, name, count(getattr(os, name)))
        writer()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, 137)
    return process.exitcode == 137


def fill(folder, text):
    (folder / "sub").mkdir()
    for name in ("a", "sub/b"):
        (folder / name).write_text(text)


def test_a_folder_is_whole_wherever_its_writer_dies(tmp_path):
    def write():
        with staged_folder(tmp_path / "out") as staging:
            fill(staging, "new")

    states, nth = set(), 0
    while die_at(nth, write):
        found = {name: Path(tmp_path / "out" / name) for name in ("a", "sub/b")}
        there = {name for name, path in found.items() if path.exists()}
        assert there in (set(), {"a", "sub/b"})
        states.add(bool(there))
        if there:
            assert {path.read_text() for path in found.values()} == {"new"}
            (tmp_path / "out").rename(tmp_path / f"seen-{nth}")
        nth += 1
    assert nth > 5 and states == {False, True}
    assert not staging_of(tmp_path / "out").exists()


def test_a_replaced_folder_is_the_old_or_the_new_one(tmp_path):
    out = tmp_path / "out"
    with staged_folder(out) as staging:
        fill(staging, "old")

    def write():
        with staged_folder(out, replace=True) as staging:
            fill(staging, "new")

    nth = 0
    while die_at(nth, write):
        # Between two renames there is neither: then both lie aside, whole.
        where = [out] if out.exists() else [staging_of(out)]
        (texts,) = [{(path / name).read_text() for name in ("a", "sub/b")} for path in where]
        assert texts in ({"old"}, {"new"})
        nth += 1
    assert (out / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    texts, nth = [], 0
    while die_at(nth, lambda: write_file(path, "new")):
        texts.append(path.read_text())
        nth += 1
    assert set(texts) == {"old", "new"} and path.read_text() == "new"
    remove_uncommitted(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out") as staging:
        fill(staging, "half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), staged_file(tmp_path / "file") as staging:
        staging.write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_replaced_only_when_asked_to(tmp_path):
    for text in ("old", "new"):
        staging = tmp_path / text
        staging.mkdir()
        fill(staging, text)
    commit(tmp_path / "old", tmp_path / "out")
    with pytest.raises(OSError):
        commit(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "old"
    commit(tmp_path / "new", tmp_path / "out", replace=True)
    assert (tmp_path / "out" / "a").read_text() == "new"


def test_a_secret_is_for_its_owner_alone(tmp_path):
    old = os.umask(0o022)
    try:
        write_file(tmp_path / "secret", b"\xff", mode=0o600)
        write_file(tmp_path / "open", "é")
    finally:
        os.umask(old)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "open").read_bytes() == "é".encode()


# Digests


def test_digests(tmp_path):
    content = os.urandom((8 << 20) + 5)
    (tmp_path / "large").write_bytes(content)
    pieces = []
    assert sha256_of(tmp_path / "large", lambda: pieces.append(1)) == (
        hashlib.sha256(content).hexdigest()
    )
    assert len(pieces) == 2
    # `printf '{"a": [1, "\\u00e9"], "b": 2}' | sha256sum`
    assert digest_of({"b": 2, "a": [1, "é"]}) == (
        hashlib.sha256(rb'{"a": [1, "\u00e9"], "b": 2}').hexdigest()
    )
    file = HashedFile(tmp_path / "hashed")
    file.write(b"ab")
    file.write(b"c")
    entry = file.finish()
    assert entry == {"size_bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert wrong_content(tmp_path / "hashed", entry) is None


def test_manifests_tell_what_is_wrong(tmp_path):
    fill(tmp_path, "text")
    listed = manifest_of(tmp_path)
    assert list(listed) == ["a", "sub/b"] and listed["a"]["size_bytes"] == 4
    assert list(manifest_of(tmp_path / "a")) == ["a"] and manifest_of(tmp_path / "none") == {}
    assert list(manifest_of(tmp_path, lambda path: path.name == "b")) == ["sub/b"]
    (tmp_path / "a").write_text("TEXT")
    assert wrong_size(tmp_path / "a", listed["a"]) is None
    assert "SHA-256" in str(wrong_content(tmp_path / "a", listed["a"]))
    (tmp_path / "a").write_text("longer")
    assert "6 bytes" in str(wrong_size(tmp_path / "a", listed["a"]))
    (tmp_path / "a").unlink()
    for check in (wrong_size, wrong_content):
        assert "missing" in str(check(tmp_path / "a", listed["a"]))


def test_a_lineage_lists_all_but_itself(tmp_path):
    fill(tmp_path, "text")
    listed = manifest_of(tmp_path)
    write_lineage(tmp_path, {"code": "abc"})
    told = json.loads((tmp_path / "lineage.json").read_text())
    assert told == {"format_version": 1, "code": "abc", "files": listed}


# Reading, finding, locking


def test_json_that_is_none_is_refused(tmp_path):
    (tmp_path / "half.json").write_text('{"a": ')
    os.mkfifo(tmp_path / "pipe")
    for name in ("half.json", "pipe", "none.json"):
        with pytest.raises(ConfigError) as caught:
            read_json("some.key", tmp_path / name, "mend it")
        assert caught.value.key == "some.key" and str(caught.value.value).endswith(name)


def test_lines_are_appended(tmp_path):
    append_line(tmp_path / "lines", "a")
    append_line(tmp_path / "lines", "é")
    assert (tmp_path / "lines").read_text(encoding="utf-8") == "a\né\n"


def test_runs_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo" / "checkpoints").mkdir(parents=True)
    assert find_run("demo", holds="checkpoints") == Path("runs/demo")
    assert find_run("runs/demo", holds="checkpoints") == Path("runs/demo")
    assert find_run("demo", holds="export") is None


HOLD = """
import sys, time
from pathlib import Path
from core.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_ends_with_its_holder(tmp_path):
    lock = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockHeldError), locked(lock, timeout_s=0):
            pass

        def give_up():
            raise TimeoutError

        with pytest.raises(TimeoutError), locked(lock, between=give_up):
            pass
        holder.kill()
        holder.wait()
        with locked(lock):
            pass
    finally:
        holder.kill()
        holder.stdout.close()
        holder.wait()
