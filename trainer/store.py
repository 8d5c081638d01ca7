"""Reads and writes an object store through fsspec: `s3://`, `gs://`, `az://`, `file://`, ..."""

from __future__ import annotations

import os
import random
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import fsspec  # type: ignore[import-untyped]
from fsspec.callbacks import Callback  # type: ignore[import-untyped]

from core.errors import ConfigError, MissingExtraError, SpotforgeError

_ATTEMPTS = 5
_BACKOFF_S = 1.0
_ASK_AGAIN_S = 10.0

T = TypeVar("T")


class Store:
    """Accesses the objects under a URL, by paths relative to it. Any thread may call any method.

    Failed requests are repeated with growing pauses, because stores refuse requests now and then by
    design; SpotforgeError reports the last failure. A missing object is an answer, not a failure,
    and raises FileNotFoundError at once where a method does not say otherwise.

    Args:
        key: Setting that names the URL, used in errors.
        url: URL of a folder in any of fsspec's file systems.

    Raises:
        ConfigError: There is no such file system, or its package is not installed.
    """

    def __init__(self, key: str, url: str) -> None:
        if "://" not in url:  # fsspec would take it, even s3:/bucket/run, for a local path
            raise ConfigError(key, url, "must be a URL", "e.g. s3://bucket/run, file:///mnt/run")
        self._is_local = url.startswith(("file://", "local://"))
        # Folders need not be created in an object store; on a local disk fsspec must create them.
        options = {"auto_mkdir": True} if self._is_local else {}
        try:
            # A new instance without a cache of listings, since other processes write there too.
            self._fs, root = fsspec.url_to_fs(url, skip_instance_cache=True, **options)
        except ImportError as e:
            package = getattr(e.__cause__, "name", None) or str(e)
            raise MissingExtraError(
                key, url, f"{package} is not installed", f"pip install {package}"
            ) from e
        except ValueError as e:
            raise ConfigError(key, url, str(e), "e.g. s3://, gs://, az:// or file:///") from e
        self._fs.dircache.use_listings_cache = False
        self._root = root.rstrip("/")
        if not self._root:
            raise ConfigError(key, url, "must name a bucket or folder", "e.g. s3://bucket/run")
        if set("*?[") & set(self._root):  # fsspec would take it for a pattern
            raise ConfigError(key, url, "must not contain *, ? or [", "choose another folder")
        self.key, self.url = key, url.rstrip("/")
        self._jitter = random.Random()  # not the global generator, whose state training may use

    def check(self, patience_s: float = 0.0, beat: Callable[[], None] = lambda: None) -> None:
        """Writes, reads and deletes a few bytes, so that a wrong URL fails at the start of the run.

        Args:
            patience_s: Time to wait for a store that does not answer, in seconds; what it refuses
                is never waited for.
            beat: Function called every second of the wait; it may raise to end it.

        Raises:
            ConfigError: One of these operations fails.
            SpotforgeError: The store has not answered for `patience_s`.
        """
        deadline = time.monotonic() + patience_s
        said = False
        while (error := self._probe()) is not None:
            rule = f"cannot be written to and read from: {one_line(error)}"
            if patience_s == 0 or isinstance(error, PermissionError | FileNotFoundError):
                fix = "check the URL and the credentials"
                raise ConfigError(self.key, self.url, rule, fix) from error
            if time.monotonic() >= deadline:
                raise SpotforgeError(
                    f"{self.key}={self.url}: {rule}, for {patience_s / 60:.0f} minutes"
                ) from error
            if not said:
                minutes = f"{patience_s / 60:.0f} minutes"
                waits = f"{self.key}={self.url}: {rule}; waiting for it for up to {minutes}"
                print(waits, file=sys.stderr, flush=True)
                said = True
            again_at = time.monotonic() + _ASK_AGAIN_S
            while time.monotonic() < again_at:
                beat()
                time.sleep(1)

    def names(self, folder: str) -> set[str]:
        """Returns the names of folders and objects directly in a folder; "" is that of the URL."""
        path = self._path(folder).rstrip("/")
        try:
            paths = self._retried("listing", lambda: self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return set()
        return {str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths}

    def sizes(self, folder: str) -> dict[str, int]:
        """Returns the size in bytes of every object in a folder, by path relative to the folder."""
        base = self._path(folder)
        try:
            found = self._retried("listing", lambda: self._fs.find(base, detail=True))
        except FileNotFoundError:
            return {}
        below = f"{base}/"  # what is found is the path itself where that is an object
        return {
            path.removeprefix(below): info["size"]
            for path, info in found.items()
            if path.startswith(below)
        }

    def size(self, path: str) -> int:
        """Returns the size of an object in bytes."""
        # Not fs.exists: some file systems report a refused request as "does not exist".
        return int(
            self._retried(f"asking for {path}", lambda: self._fs.info(self._path(path))["size"])
        )

    def read(self, path: str) -> bytes:
        """Returns the content of a small object."""
        content: bytes = self._retried(
            f"reading {path}", lambda: self._fs.cat_file(self._path(path))
        )
        return content

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Returns `length` bytes of an object from `offset` on."""

        def get() -> bytes:
            content = self._fs.cat_file(self._path(path), start=offset, end=offset + length)
            if len(content) != length:
                raise OSError(f"expected {length} bytes from {offset} on, got {len(content)}")
            return bytes(content)

        return self._retried(f"reading {path}", get) if length else b""

    def fetch(self, path: str, local: Path, size_bytes: int, beat: Callable[[], None]) -> None:
        """Downloads an object to a local file; `beat` is called for every received piece."""

        def get() -> None:
            beat()
            self._fs.get_file(self._path(path), str(local), callback=_Beat(beat))
            if local.stat().st_size != size_bytes:
                raise OSError(f"expected {size_bytes} bytes, got {local.stat().st_size}")

        self._retried(f"downloading {path}", get)

    def put(self, local: Path, path: str) -> None:
        """Uploads a local file."""
        size_bytes = local.stat().st_size
        self._put(path, size_bytes, lambda to: self._fs.put_file(str(local), to))

    def write(self, path: str, content: bytes) -> None:
        """Writes a small object, which readers see whole or not at all."""

        def write(to: str) -> None:
            if not self._is_local:
                self._fs.pipe_file(to, content)
                return
            part = f"{to}.part"  # on a disk only a rename makes it whole
            self._fs.pipe_file(part, content)
            self._fs.mv(part, to)

        self._put(path, len(content), write)

    def remove(self, path: str) -> None:
        """Removes an object if it exists."""
        try:
            self._retried(f"removing {path}", lambda: self._fs.rm_file(self._path(path)))
        except FileNotFoundError:
            pass

    def remove_folder(self, folder: str) -> None:
        """Removes a folder with all its objects if it exists."""
        base = self._path(folder)
        try:
            self._retried(f"removing {folder}", lambda: self._fs.rm(base, recursive=True))
        except FileNotFoundError:
            pass

    def remove_empty(self, folder: str) -> None:
        """Removes folders in which there is nothing, which only a local disk has."""
        if self._is_local:
            for path, _, _ in os.walk(self._path(folder), topdown=False):
                with suppress(OSError):  # another process has put something there
                    os.rmdir(path)

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _probe(self) -> Exception | None:
        """Returns why the store cannot be written to and read from; None if it can."""
        path, content = self._path(f".probe-{uuid.uuid4().hex}"), b"spotforge"

        def probe() -> None:
            self._fs.pipe_file(path, content)
            if self._fs.cat_file(path) != content:
                raise OSError("the content read differs from the content written")
            self._fs.rm_file(path)

        try:
            self._attempt(probe, attempts=3)
        except Exception as e:
            return e
        return None

    def _put(self, path: str, size_bytes: int, put: Callable[[str], None]) -> None:
        to = self._path(path)

        def put_whole() -> None:
            try:
                put(to)
                # An upload may be cut short without an error.
                found = self._fs.info(to)["size"]
            except FileNotFoundError as e:  # there is no such bucket, or the file was not stored
                raise OSError(one_line(e)) from e
            if found != size_bytes:
                raise OSError(f"expected {size_bytes} bytes, got {found}")

        self._retried(f"uploading {path}", put_whole)

    def _retried(self, what: str, action: Callable[[], T]) -> T:
        """Calls `action` until it succeeds; FileNotFoundError is an answer and is raised."""
        try:
            return self._attempt(action, _ATTEMPTS)
        except FileNotFoundError:
            raise
        except Exception as e:
            raise SpotforgeError(
                f"{self.key}={self.url}: {what} failed {_ATTEMPTS} times: {one_line(e)}"
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


class _Beat(Callback):  # type: ignore[misc]
    """Reports each received piece of a file."""

    def __init__(self, beat: Callable[[], None]) -> None:
        super().__init__()
        self._beat = beat

    def relative_update(self, inc: int = 1) -> None:
        self._beat()


def one_line(error: BaseException) -> str:
    """Returns the type and the text of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
