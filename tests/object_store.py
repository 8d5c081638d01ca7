"""An object store for tests: `double://bucket/key`, an fsspec file system over a local folder.

Like S3 it has flat keys (a folder is a common prefix), objects that appear whole or not at all, no
rename, a put that overwrites, a delete that does not mind what is absent, and listings that a
client remembers unless told not to. Unlike S3 it says what was done to it (`operations`), and fails
as the environment has it, so that processes started by a test see the same store:

    OBJECT_STORE_FOLDER   where the objects lie
    OBJECT_STORE_FAULTS   e.g. "fail_every=3": each third put fails (of those of this process)
                          "fail_after=5": so does each after the fifth
                          "truncate_every=2": each second put stores half of it and says nothing
                          "slow_s=0.1": each put takes so long
                          "hang_after=2": a put after the second takes for ever
                          "refuse=1": any request is refused
                          "away=1": no request is answered
"""

import json
import os
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractFileSystem


class ObjectStore(AbstractFileSystem):
    """Use it through fsspec; `ObjectStore.num_puts` may be reset."""

    protocol = "double"
    num_puts = 0
    _counting = threading.Lock()

    def ls(self, path, detail=True, **kwargs):
        _take_note("ls", path)
        prefix = self._strip_protocol(path)
        entries = self._ls_from_cache(prefix)
        if entries is None:
            entries = self.dircache[prefix] = _entries(prefix)
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path, **kwargs):
        _take_note("info", path)
        path = self._strip_protocol(path)
        for entry in self._ls_from_cache(path) or []:
            if entry["name"] == path:
                return entry
        if _file_of(path).exists():
            return {"name": path, "size": _file_of(path).stat().st_size, "type": "file"}
        _entries(path)  # raises where it is no common prefix either
        return {"name": path, "size": 0, "type": "directory"}

    def put_file(self, lpath, rpath, callback=None, mode="overwrite", **kwargs):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        faults = _faults()
        time.sleep(faults.get("slow_s", 0))
        with self._counting:
            ObjectStore.num_puts += 1
            count = ObjectStore.num_puts
        if count > faults.get("hang_after", count):
            time.sleep(3600)
        if _each(count, faults.get("fail_every")) or count > faults.get("fail_after", count):
            raise StoreError("503 Slow Down")
        if _each(count, faults.get("truncate_every")):
            value = value[: len(value) // 2]
        _take_note("put", path)
        path = self._strip_protocol(path)
        part = _folder() / f".part-{uuid.uuid4().hex}"
        part.write_bytes(value)
        part.replace(_file_of(path))
        self.invalidate_cache()

    def cat_file(self, path, start=None, end=None, **kwargs):
        _take_note("get", path)
        return _file_of(self._strip_protocol(path)).read_bytes()[start:end]

    def get_file(self, rpath, lpath, callback=None, **kwargs):
        Path(lpath).write_bytes(self.cat_file(rpath))

    def _rm(self, path):
        if _file_of(self._strip_protocol(path)).exists():
            _take_note("rm", path)
            _file_of(self._strip_protocol(path)).unlink()
        self.invalidate_cache()

    def rmdir(self, path):
        pass  # there are none

    def invalidate_cache(self, path=None):
        self.dircache.clear()


class StoreError(Exception):
    """As some stores' packages have it, neither an OSError nor anything else of ours."""


fsspec.register_implementation("double", ObjectStore)


def objects():
    """{key: content} of all there is."""
    return {unquote(p.name): p.read_bytes() for p in _folder().iterdir() if p.name[0] != "."}


def operations():
    """What was done, in order and by any process: `put bucket/key`, `rm bucket/key`, ..."""
    return (_folder() / ".operations").read_text().splitlines()


def damage(key, content):
    """Replaces an object behind everyone's back."""
    assert _file_of(key).exists(), key
    _file_of(key).write_bytes(content)


def _take_note(operation, path):
    if _faults().get("refuse"):
        raise PermissionError("403 Forbidden")
    if _faults().get("away"):
        raise StoreError("connection timed out")
    with (_folder() / ".operations").open("a") as f:
        f.write(f"{operation} {ObjectStore._strip_protocol(path)}\n")


def _entries(prefix):
    """What a listing of `prefix` holds: objects, and the first folder of deeper keys."""
    entries = {}
    for file in _folder().iterdir():
        key = unquote(file.name)
        if file.name[0] != "." and key.startswith(f"{prefix}/"):
            child, _, deeper = key[len(prefix) + 1 :].partition("/")
            kind, size = ("directory", 0) if deeper else ("file", file.stat().st_size)
            name = f"{prefix}/{child}"
            entries[name] = {"name": name, "size": size, "type": kind}
    if not entries:
        raise FileNotFoundError(prefix)
    return [entries[name] for name in sorted(entries)]


def _file_of(key):
    return _folder() / quote(key, safe="").replace(".", "%2E")


def _folder():
    return Path(os.environ["OBJECT_STORE_FOLDER"])


def _faults():
    pairs = (item.split("=") for item in os.environ.get("OBJECT_STORE_FAULTS", "").split())
    return {name: json.loads(value) for name, value in pairs}


def _each(count, every):
    return every is not None and count % every == 0
