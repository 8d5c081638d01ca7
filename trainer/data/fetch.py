"""Fetches prepared folders from other machines and from an object store, and uploads them.

A folder is fetched into a staging folder, verified against the digests in its manifest, and only
then committed under its name, like one that is prepared here.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from core import layout
from core.errors import ConfigError, DamagedError, Interrupted, SpotforgeError
from core.folder import BLOCK_BYTES, Entry, wrong_content
from parallel.peers import PeerFiles
from trainer.data.files import StopRequested, check_stop
from trainer.data.tokens import entries_of, parse_manifest, read_manifest
from trainer.data.writer import FORMAT_VERSION, folder_name, given_name
from trainer.store import Store

URL_KEY = "data.cache_url"


class Origin(Protocol):
    """A place from which one folder can be fetched."""

    @property
    def where(self) -> str:
        """Place of the folder, for messages."""

    def read_manifest(self) -> bytes:
        """Returns the bytes of its manifest."""

    def fetch(self, file: str, size_bytes: int, local: Path, stop_requested: StopRequested) -> None:
        """Writes one of its files to `local`; polls `stop_requested` for each piece."""

    def damaged(self, file: str, rule: str) -> DamagedError:
        """Returns the error that a file is damaged."""


@dataclass(frozen=True)
class PeerFolder:
    """A folder on the disk of another machine of the run.

    Attributes:
        peers: Files of the other machines.
        rank: Rank that reads it from its disk.
        host: Name of that rank's machine.
        served: Name under which the machine serves the folder, or one that contains it.
        inside: Path of the folder in the served one; `.` if it is that one.
        path: Path of the folder on that machine.
    """

    peers: PeerFiles
    rank: int
    host: str
    served: str
    inside: str
    path: str

    @property
    def where(self) -> str:
        """Rank and machine."""
        return f"rank {self.rank} on {self.host}"

    def read_manifest(self) -> bytes:
        """Returns the bytes of its manifest."""
        path = f"{self.inside}/{layout.MANIFEST}"
        size_bytes = self.peers.size_of(self.rank, self.served, path)
        return self.peers.read(self.rank, self.served, path, 0, size_bytes) if size_bytes else b""

    def fetch(self, file: str, size_bytes: int, local: Path, stop_requested: StopRequested) -> None:
        """Writes one of its files to `local`, in pieces of 8 MiB."""
        path = f"{self.inside}/{file}"
        with local.open("wb") as out:
            for offset in range(0, size_bytes, BLOCK_BYTES):
                check_stop(stop_requested)
                length = min(BLOCK_BYTES, size_bytes - offset)
                out.write(self.peers.read(self.rank, self.served, path, offset, length))

    def damaged(self, file: str, rule: str) -> DamagedError:
        """Returns the error that a file is damaged, there or on its way."""
        fix = f"start again; if it is still so, delete {self.path} on that machine"
        return DamagedError("data", f"{self.path}/{file} of {self.where}", rule, fix)


@dataclass(frozen=True)
class StoredFolder:
    """A folder in the object store."""

    store: Store
    name: str

    @property
    def where(self) -> str:
        """URL of the folder."""
        return f"{self.store.url}/{self.name}"

    def read_manifest(self) -> bytes:
        """Returns the bytes of its manifest."""
        return self.store.read(f"{self.name}/{layout.MANIFEST}")

    def fetch(self, file: str, size_bytes: int, local: Path, stop_requested: StopRequested) -> None:
        """Writes one of its files to `local`."""

        def beat() -> None:  # an error would count as a failed request, and be tried again
            stop_requested()

        path = f"{self.name}/{file}"
        # Asked first, since an object of another size would be fetched again and again.
        if (found := self.store.size(path)) != size_bytes:
            raise self.damaged(file, f"has {found} bytes, but {size_bytes} were written")
        self.store.fetch(path, local, size_bytes, beat)

    def damaged(self, file: str, rule: str) -> DamagedError:
        """Returns the error that a file is damaged."""
        fix = f"delete {self.name} there; it is prepared and uploaded again"
        return DamagedError(URL_KEY, f"{self.where}/{file}", rule, fix)


def fetch_folder(origin: Origin, name: str, staging: Path, stop_requested: StopRequested) -> None:
    """Fetches all files of a prepared folder, and verifies their digests.

    Args:
        origin: Place of the folder.
        name: Name that the folder will have in the cache.
        staging: Empty folder to fill; it is empty again after an error.
        stop_requested: Function that is polled.

    Raises:
        DamagedError: A file is missing, or is not the one that was written; names it.
        FileNotFoundError: There is no such folder.
        OSError: The other machine does not answer, or this disk is full.
        SpotforgeError: The object store does not answer.
    """
    content = origin.read_manifest()
    try:
        manifest = parse_manifest(content)
    except ValueError as e:
        raise origin.damaged(layout.MANIFEST, str(e)) from e
    if manifest.get("format_version") != FORMAT_VERSION:
        rule = f"has format {manifest.get('format_version')}, this version reads {FORMAT_VERSION}"
        raise origin.damaged(layout.MANIFEST, rule)
    made_of = folder_name(manifest["source"], manifest["transform"])
    if name not in (made_of, given_name(manifest["digest"])):
        raise origin.damaged(layout.MANIFEST, f"is not that of {name}")
    entries = entries_of(manifest)
    with _emptied_after_errors(staging):
        _fetch_files(origin, name, entries, staging, stop_requested)
        (staging / layout.MANIFEST).write_bytes(content)


def _fetch_files(
    origin: Origin,
    name: str,
    entries: list[dict[str, Any]],
    staging: Path,
    stop_requested: StopRequested,
) -> None:
    megabytes = sum(entry["size_bytes"] for entry in entries) / 1e6
    print(f"fetching {name} ({megabytes:,.1f} MB) from {origin.where}", file=sys.stderr)
    for entry in entries:
        check_stop(stop_requested)
        file, size_bytes = entry["file"], entry["size_bytes"]
        # The manifest comes from outside: a path such as ../../.bashrc must not be written.
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise origin.damaged(layout.MANIFEST, f"lists {file!r}, which is not inside the folder")
        local = staging / file
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            origin.fetch(file, size_bytes, local, stop_requested)
        except FileNotFoundError as e:
            raise origin.damaged(file, "is missing") from e
        expected: Entry = {"size_bytes": size_bytes, "sha256": entry["sha256"]}
        if fault := wrong_content(local, expected, lambda: check_stop(stop_requested)):
            raise origin.damaged(file, fault)


@contextmanager
def _emptied_after_errors(folder: Path) -> Iterator[None]:
    """Removes what a block has put into a folder if it fails: the next origin may have others."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder)
        folder.mkdir()
        raise


class DataStore:
    """The object store at `data.cache_url`, which keeps prepared folders by their names.

        <url>/<name>/...             as in a cache
        <url>/<name>/manifest.json   uploaded last; without it there is no folder

    A store that does not answer never ends a run that can go on without it.

    Args:
        url: Value of `data.cache_url`.

    Raises:
        ConfigError: The URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        self._store = Store(URL_KEY, url)

    def fetch(self, name: str, staging: Path, stop_requested: StopRequested) -> bool:
        """Fills an empty folder; returns whether the store has one of that name, and answers.

        If not, the folder is empty again.

        Raises:
            DamagedError: A file is not the one that was written; names it.
            ConfigError: The store may not be read.
        """
        try:
            fetch_folder(StoredFolder(self._store, name), name, staging, stop_requested)
        except FileNotFoundError:
            return False
        except (ConfigError, Interrupted):
            raise
        except SpotforgeError as e:
            if isinstance(e.__cause__, PermissionError):
                fix = "check the URL and the credentials"
                raise ConfigError(URL_KEY, self._store.url, "may not be read", fix) from e
            print(f"{e}; going on without it", file=sys.stderr)
            return False
        return True

    def upload(self, name: str, folder: Path, stop_requested: StopRequested) -> None:
        """Uploads a prepared folder unless the store has it; a failure is only reported.

        Raises:
            Interrupted: A stop was requested; the next start uploads it again.
        """
        files = [entry["file"] for entry in entries_of(read_manifest(folder))]
        try:
            if self._has(name):
                return
            print(f"uploading {name} to {self._store.url}", file=sys.stderr)
            for file in files:
                check_stop(stop_requested)
                self._store.put(folder / file, f"{name}/{file}")
            # The last one, and whole or not at all on a disk as well: it makes the folder be there.
            content = (folder / layout.MANIFEST).read_bytes()
            self._store.write(f"{name}/{layout.MANIFEST}", content)
        except Interrupted:
            raise
        except SpotforgeError as e:
            print(f"{e}; {name} is uploaded at the next start", file=sys.stderr)

    def _has(self, name: str) -> bool:
        try:
            self._store.size(f"{name}/{layout.MANIFEST}")
        except FileNotFoundError:
            return False
        return True
