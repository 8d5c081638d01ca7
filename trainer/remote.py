"""Stores checkpoints in an object store through fsspec: `s3://`, `gs://`, `az://`, `file://`, ...

    <url>/step-00001000/__0_0.distcp ...   as on disk (see checkpoint.py)
    <url>/step-00001000/manifest.json      uploaded last; without it there is no checkpoint

An object store has no rename, so the manifest commits a checkpoint: it is written once all other
files are known to be there, and removed before any other file.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import fsspec  # type: ignore[import-untyped]
from fsspec.callbacks import Callback  # type: ignore[import-untyped]

from core import layout
from core.errors import ConfigError, DamagedError, MissingExtraError, SpotforgeError
from core.folder import Entry, Manifest, staged_folder, wrong_content

_KEY = "checkpoint.upload"
_NAME = re.compile(rf"{layout.STEP}\d+")
_ATTEMPTS = 5
_BACKOFF_S = 1.0

T = TypeVar("T")


class RemoteCheckpoints:
    """Stores the checkpoints of one run under a URL. Methods may be called from any thread.

    Failed requests are repeated with growing pauses, because stores refuse requests now and then by
    design; SpotforgeError reports the last failure.

    Args:
        url: URL of the folder that holds them, in any of fsspec's file systems.

    Raises:
        ConfigError: There is no such file system, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        if "://" not in url:  # fsspec would take it, even s3:/bucket/run, for a local path
            raise ConfigError(_KEY, url, "must be a URL", "e.g. s3://bucket/run, file:///mnt/run")
        # Folders need not be created in an object store; on a local disk fsspec must create them.
        options = {"auto_mkdir": True} if url.startswith(("file://", "local://")) else {}
        try:
            # A new instance without a cache of listings, since other processes write there too.
            self._fs, root = fsspec.url_to_fs(url, skip_instance_cache=True, **options)
        except ImportError as e:
            package = getattr(e.__cause__, "name", None) or str(e)
            raise MissingExtraError(
                _KEY, url, f"{package} is not installed", f"pip install {package}"
            ) from e
        except ValueError as e:
            raise ConfigError(_KEY, url, str(e), "e.g. s3://, gs://, az:// or file:///") from e
        self._fs.dircache.use_listings_cache = False
        self._root = root.rstrip("/")
        if not self._root:
            raise ConfigError(_KEY, url, "must name a bucket or folder", "e.g. s3://bucket/run")
        if set("*?[") & set(self._root):  # fsspec would take it for a pattern
            raise ConfigError(_KEY, url, "must not contain *, ? or [", "choose another folder")
        self.url = url.rstrip("/")
        self._jitter = random.Random()  # not the global generator, whose state training may use

    def check(self) -> None:
        """Writes, reads and deletes a few bytes, so that a wrong URL fails at the start of the run.

        Raises:
            ConfigError: One of these operations fails.
        """
        path, content = f"{self._root}/.probe-{uuid.uuid4().hex}", b"spotforge"

        def probe() -> None:
            self._fs.pipe_file(path, content)
            if self._fs.cat_file(path) != content:
                raise OSError("the content read differs from the content written")
            self._fs.rm_file(path)

        try:
            self._attempt(probe, attempts=3)
        except Exception as e:
            rule = f"cannot be written to and read from: {_line(e)}"
            raise ConfigError(_KEY, self.url, rule, "check the URL and the credentials") from e

    def names(self) -> list[str]:
        """Returns the committed checkpoints, newest first."""
        return [name for name in self._all_names() if self._is_committed(name)]

    def read(self, name: str, file: str) -> bytes:
        """Returns one small file of a committed checkpoint, unverified."""
        path = f"{self._base(name)}/{file}"
        content: bytes = self._retried(f"reading {path}", lambda: self._fs.cat_file(path))
        return content

    def upload(self, checkpoint: Path, files: Iterable[str]) -> None:
        """Uploads some files of a checkpoint, which only `commit` makes complete.

        Every rank may upload its own files; what an earlier attempt left is overwritten.
        """
        base = self._base(checkpoint.name)
        # A committed checkpoint of that name is a mix of old and new from here on.
        self._withdraw(checkpoint.name)
        for file in files:
            self._put(checkpoint / file, f"{base}/{file}")

    def commit(self, checkpoint: Path) -> None:
        """Makes an uploaded checkpoint one that `names` returns.

        Raises:
            SpotforgeError: A file of its manifest is missing or incomplete.
        """
        base = self._base(checkpoint.name)
        sizes = self._sizes(base)
        for file, entry in json.loads((checkpoint / layout.MANIFEST).read_text())["files"].items():
            found = sizes.get(f"{base}/{file}")
            if found != entry["size_bytes"]:
                wrong = "is missing" if found is None else "has the wrong size"
                raise SpotforgeError(
                    f"{_KEY}={self.url}: {checkpoint.name} is not committed: {file} {wrong}"
                )
        self._put(checkpoint / layout.MANIFEST, f"{base}/{layout.MANIFEST}")

    def download(self, name: str, folder: Path, beat: Callable[[], None] = lambda: None) -> Path:
        """Downloads a checkpoint and commits it in `folder`, replacing one of that name.

        Args:
            name: Name among `names()`.
            folder: Folder of checkpoints.
            beat: Function called for every received piece.

        Returns:
            Path of the checkpoint, `folder / name`.

        Raises:
            DamagedError: A file is missing, short or altered; names the first one.
            ConfigError: The disk is too small for it.
        """
        manifest, files = self._manifest(name)
        with staged_folder(folder / name, replace=True) as staging:
            _check_space(folder, sum(entry["size_bytes"] for entry in files.values()))
            for file, entry in files.items():
                self._fetch(name, file, staging / file, entry, beat)
            (staging / layout.MANIFEST).write_bytes(manifest)
        return folder / name

    def delete(self, name: str) -> None:
        """Removes a checkpoint, its manifest first, so that a partial one is not committed."""
        self._withdraw(name)
        try:
            base = self._base(name)
            self._retried(f"removing {name}", lambda: self._fs.rm(base, recursive=True))
        except FileNotFoundError:
            pass

    def remove_incomplete(self, except_names: Iterable[str] = ()) -> None:
        """Removes what killed uploads have left.

        Args:
            except_names: Checkpoints whose upload is in progress.
        """
        for name in set(self._all_names()) - set(except_names):
            if not self._is_committed(name):
                self.delete(name)

    def _base(self, name: str) -> str:
        assert _NAME.fullmatch(name), name
        return f"{self._root}/{name}"

    def _all_names(self) -> list[str]:
        try:
            paths = self._retried("listing", lambda: self._fs.ls(self._root, detail=False))
        except FileNotFoundError:
            return []
        found = {str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths}
        return sorted(filter(_NAME.fullmatch, found), reverse=True)

    def _is_committed(self, name: str) -> bool:
        # Not fs.exists: some file systems report a refused request as "does not exist".
        path = f"{self._base(name)}/{layout.MANIFEST}"
        try:
            self._retried(f"asking for {name}", lambda: self._fs.info(path))
        except FileNotFoundError:
            return False
        return True

    def _sizes(self, base: str) -> dict[str, int]:
        """Returns the size in bytes of every file below `base`, by path."""
        try:
            found = self._retried("listing", lambda: self._fs.find(base, detail=True))
        except FileNotFoundError:
            return {}
        return {path: info["size"] for path, info in found.items()}

    def _put(self, local: Path, path: str) -> None:
        size_bytes = local.stat().st_size

        def put() -> None:
            try:
                self._fs.put_file(str(local), path)
                # An upload may be cut short without an error.
                found = self._fs.info(path)["size"]
            except FileNotFoundError as e:  # there is no such bucket, or the file was not stored
                raise OSError(_line(e)) from e
            if found != size_bytes:
                raise OSError(f"expected {size_bytes} bytes, got {found}")

        self._retried(f"uploading {local.parent.name}/{local.name}", put)

    def _fetch(
        self,
        name: str,
        file: str,
        local: Path,
        entry: Entry,
        beat: Callable[[], None],
    ) -> None:
        path = f"{self._base(name)}/{file}"
        local.parent.mkdir(parents=True, exist_ok=True)

        def get() -> None:
            beat()
            self._fs.get_file(path, str(local), callback=_Beat(beat))
            if local.stat().st_size != entry["size_bytes"]:
                raise OSError(f"expected {entry['size_bytes']} bytes, got {local.stat().st_size}")

        what = f"downloading {name}/{file}"
        try:
            if self._retried(what, lambda: self._fs.info(path)["size"]) != entry["size_bytes"]:
                raise self._damaged(name, f"{file} has the wrong size")
            self._retried(what, get)
        except FileNotFoundError as e:
            raise self._damaged(name, f"{file} is missing") from e
        if fault := wrong_content(local, entry):
            raise self._damaged(name, f"{file} {fault}")

    def _manifest(self, name: str) -> tuple[bytes, Manifest]:
        """Returns the raw manifest, and the files that it lists."""
        path = f"{self._base(name)}/{layout.MANIFEST}"
        try:
            content: bytes = self._retried(f"reading {path}", lambda: self._fs.cat_file(path))
            entries = json.loads(content)["files"].items()
            files: Manifest = {
                str(file): {"size_bytes": int(e["size_bytes"]), "sha256": str(e["sha256"])}
                for file, e in entries
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise self._damaged(name, f"{layout.MANIFEST} cannot be read ({_line(e)})") from e
        # The manifest comes from outside: a path such as ../../.bashrc must not be written.
        for file in files:
            parts = PurePosixPath(file).parts
            outside = not parts or parts[0] == "/" or ".." in parts or "\0" in file
            if outside or file == layout.MANIFEST:
                raise self._damaged(
                    name, f"{layout.MANIFEST} lists {file!r}, which is not inside the checkpoint"
                )
        return content, files

    def _withdraw(self, name: str) -> None:
        """Removes a checkpoint's manifest, so that `names` no longer returns it."""
        path = f"{self._base(name)}/{layout.MANIFEST}"
        try:
            self._retried(f"removing {path}", lambda: self._fs.rm_file(path))
        except FileNotFoundError:
            pass

    def _retried(self, what: str, action: Callable[[], T]) -> T:
        """Calls `action` until it succeeds; FileNotFoundError is an answer and is raised."""
        try:
            return self._attempt(action, _ATTEMPTS)
        except FileNotFoundError:
            raise
        except Exception as e:
            raise SpotforgeError(
                f"{_KEY}={self.url}: {what} failed {_ATTEMPTS} times: {_line(e)}"
            ) from e

    def _attempt(self, action: Callable[[], T], attempts: int) -> T:
        for attempt in range(attempts - 1):
            try:
                return action()
            except FileNotFoundError:
                raise
            except Exception:  # every package behind fsspec raises its own errors
                # The random factor keeps ranks from repeating their requests at the same moment.
                time.sleep(_BACKOFF_S * 2**attempt * self._jitter.uniform(0.5, 1.5))
        return action()

    def _damaged(self, name: str, rule: str) -> DamagedError:
        fix = "delete that one, or resume from another checkpoint"
        return DamagedError("resume", f"{self.url}/{name}", rule, fix)


class _Beat(Callback):  # type: ignore[misc]
    """Reports each received piece of a file."""

    def __init__(self, beat: Callable[[], None]) -> None:
        super().__init__()
        self._beat = beat

    def relative_update(self, inc: int = 1) -> None:
        self._beat()


def _check_space(folder: Path, need_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise ConfigError(
            "run.dir",
            folder.parent,
            f"the checkpoint to fetch has {need_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB "
            "are free",
            "free space, or use a larger disk",
        )


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
