"""Keeps checkpoints in an object store.

    <url>/step-00001000/generation-7/__0_0.distcp ...   as on disk (see checkpoint.py)
    <url>/step-00001000/generation-7/manifest.json      uploaded last; without it there is none
    <url>/starts/7-1c9e...                              the newest start of the run: host, process

An object store has no rename, so the manifest commits a checkpoint: it is written once all other
files are known to be there, and removed before any other file.

Each start of a run has a higher number, its generation, and a folder of its own for what it
uploads. An older start that still runs somewhere can change no object of a newer one, at whatever
moment it was held up; it looks into `starts/` before and after what it commits, and ends. A
checkpoint of several generations is that of the newest one that is committed. Checkpoints that were
uploaded before there were generations lie directly in `step-00001000/`, and count as generation 0.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from core import layout
from core.errors import ConfigError, DamagedError, SpotforgeError, SupersededError
from core.folder import Entry, Manifest, staged_folder, wrong_content
from trainer.store import Store, one_line

_KEY = "checkpoint.upload"
_NAME = re.compile(rf"{layout.STEP}\d+")
_STARTS = "starts"
_START = re.compile(r"([1-9]\d*)-([0-9a-f]+)")
_GENERATION = re.compile(r"generation-([1-9]\d*)")
_PATIENCE_S = 900.0


@dataclass(frozen=True)
class StoredManifest:
    """Describes a stored checkpoint.

    Attributes:
        content: Manifest as it is stored.
        files: Files that it lists.
        generation: Start of the run that uploaded the checkpoint.
    """

    content: bytes
    files: Manifest
    generation: int


@dataclass(frozen=True, order=True)
class _Start:
    """Identifies a start of a run; of two with the same number, one is the newer one for all."""

    generation: int
    id: str

    def __str__(self) -> str:
        return f"{self.generation}-{self.id}"

    @property
    def path(self) -> str:
        # Each start writes an object of its own, so that an older one that was held up while it
        # claimed the store does not overwrite what a newer one wrote.
        return f"{_STARTS}/{self}"


class RemoteCheckpoints:
    """Stores the checkpoints of one run under a URL. Methods may be called from any thread.

    Failed requests are repeated; SpotforgeError reports the last failure (see `Store`).

    Args:
        url: URL of the folder that holds them, in any of fsspec's file systems.

    Raises:
        ConfigError: There is no such file system, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self._store = Store(_KEY, url)
        self.url = self._store.url
        self._claimed: _Start | None = None
        self._located: dict[str, int] = {}  # generation that a name was last found to have
        self._whole: set[tuple[str, int]] = set()  # those whose files were seen to be all there
        self._seen: set[str] | None = None

    def check(self, begun_before: bool = False, beat: Callable[[], None] = lambda: None) -> None:
        """Writes, reads and deletes a few bytes, so that a wrong URL fails at the start of the run.

        Args:
            begun_before: True waits for a store that does not answer, for up to 15 minutes: it did
                answer when the run began.
            beat: Function called every second of the wait; it may raise to end it.

        Raises:
            ConfigError: One of these operations fails.
            SpotforgeError: The wait was in vain.
        """
        self._store.check(_PATIENCE_S if begun_before else 0.0, beat)

    def generation(self) -> int:
        """Returns the number of the newest start of the run; 0 if no start has claimed the store.

        The next start takes a higher one.
        """
        return max((start.generation for start in self._starts()), default=0)

    def claim(self, generation: int) -> list[str]:
        """Makes this start the newest one, so that older ones can commit and delete nothing more.

        Returns:
            Checkpoints that older starts have committed since `names` was called, if it was, newest
            first; this start, which does not know them, must not go on.

        Raises:
            SupersededError: Another start took this number or a higher one.
        """
        refusal = f"generation {generation} does not begin"
        self._refuse_superseded(refusal, generation - 1)
        start = _Start(generation, uuid.uuid4().hex)
        where = {"generation": generation, "host": socket.gethostname(), "pid": os.getpid()}
        self._store.write(start.path, json.dumps(where).encode())
        self._claimed = start
        self._refuse_superseded(refusal)
        for older in self._starts():
            if older < start:
                self._store.remove(older.path)
        known = self._seen
        return [] if known is None else [name for name in self.names() if name not in known]

    @property
    def start(self) -> str:
        """Name of the start that has claimed the store through this object."""
        assert self._claimed is not None
        return str(self._claimed)

    def act_for(self, start: str) -> None:
        """Uploads from now on for a start that another process of the run has claimed.

        Args:
            start: Name of that start, which is the property `start` in that process.
        """
        generation, _, id = start.partition("-")
        self._claimed = _Start(int(generation), id)

    def names(self) -> list[str]:
        """Returns the committed checkpoints, newest first."""
        names = [name for name in self._all_names() if self._locate(name) is not None]
        self._seen = set(names)
        return names

    def manifest(self, name: str) -> StoredManifest:
        """Returns the manifest of a checkpoint.

        Raises:
            DamagedError: It is missing or cannot be read, or lists a path outside the checkpoint.
        """
        generation = self._locate(name) or 0
        try:
            content = self._store.read(f"{_folder(name, generation)}/{layout.MANIFEST}")
            files = _files_of(content)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise self._damaged(name, f"{layout.MANIFEST} cannot be read ({one_line(e)})") from e
        # The manifest comes from outside: a path such as ../../.bashrc must not be written.
        for file in files:
            parts = PurePosixPath(file).parts
            outside = not parts or parts[0] == "/" or ".." in parts or "\0" in file
            if outside or file == layout.MANIFEST:
                raise self._damaged(
                    name, f"{layout.MANIFEST} lists {file!r}, which is not inside the checkpoint"
                )
        return StoredManifest(content, files, generation)

    def read(self, name: str, file: str) -> bytes:
        """Returns one small file of a committed checkpoint, unverified."""
        return self._store.read(self._path_of(name, file))

    def read_range(self, name: str, file: str, offset: int, length: int) -> bytes:
        """Returns `length` bytes of a file of a committed checkpoint, unverified.

        Raises:
            DamagedError: The file is missing or ends before.
        """
        path = self._path_of(name, file)
        try:
            return self._store.read_range(path, offset, length)
        except FileNotFoundError as e:
            raise self._damaged(name, f"{file} is missing") from e
        except SpotforgeError as e:
            if self._store.size(path) < offset + length:  # stores answer that in different ways
                raise self._damaged(name, f"{file} has the wrong size") from e
            raise

    def check_newest(self, checkpoint: Path) -> None:
        """Raises SupersededError if a later start has taken over: this one uploads no more."""
        name, generation = checkpoint.name, _generation_of(checkpoint)
        self._refuse_superseded(f"{name} of generation {generation} is not uploaded", generation)

    def upload(self, checkpoint: Path, files: Iterable[str], done: set[str] | None = None) -> None:
        """Uploads some files of a checkpoint, which only `commit` makes complete.

        Every machine may upload its own files; what an earlier attempt left is overwritten.

        Args:
            checkpoint: Committed checkpoint on disk, whose manifest names the generation.
            files: Paths relative to it.
            done: Files that an earlier attempt has uploaded, which are passed over; those of this
                one are added.

        Raises:
            SupersededError: A later start of the run has taken over.
        """
        self.check_newest(checkpoint)
        folder = _folder(checkpoint.name, _generation_of(checkpoint))
        # A committed checkpoint of that name is a mix of old and new from here on.
        self._store.remove(f"{folder}/{layout.MANIFEST}")
        done = set() if done is None else done
        for file in files:
            if file not in done:
                self._store.put(checkpoint / file, f"{folder}/{file}")
                done.add(file)

    def commit(self, checkpoint: Path) -> None:
        """Makes an uploaded checkpoint one that `names` returns.

        Raises:
            SpotforgeError: A file of its manifest is missing or incomplete.
            SupersededError: A later start of the run has taken over.
        """
        name, generation = checkpoint.name, _generation_of(checkpoint)
        folder = _folder(name, generation)
        content = (checkpoint / layout.MANIFEST).read_bytes()
        stored = self._stored(name)
        refusal = f"{name} of generation {generation} is not committed"
        self._refuse_superseded(refusal, generation)  # before it looks for what that one removed
        for file, entry in _files_of(content).items():
            found = stored[generation].get(file)
            if found != entry["size_bytes"]:
                wrong = "is missing" if found is None else "has the wrong size"
                raise SpotforgeError(f"{_KEY}={self.url}: {name} is not committed: {file} {wrong}")
        manifest = f"{folder}/{layout.MANIFEST}"
        self._store.write(manifest, content)
        try:
            # A start that took over meanwhile may have looked for checkpoints before.
            self._refuse_superseded(refusal, generation)
        except SupersededError:
            self._store.remove(manifest)
            raise
        self._located[name] = generation
        self._remove(name, {older: stored[older] for older in stored if older < generation})

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
        manifest = self.manifest(name)
        with staged_folder(folder / name, replace=True) as staging:
            _check_space(folder, sum(entry["size_bytes"] for entry in manifest.files.values()))
            for file, entry in manifest.files.items():
                self._fetch(name, file, staging / file, entry, beat)
            (staging / layout.MANIFEST).write_bytes(manifest.content)
        return folder / name

    def delete(self, name: str) -> None:
        """Removes a checkpoint, its manifest first, so that a partial one is not committed.

        What a newer start uploads under that name stays.

        Raises:
            SupersededError: A later start of the run has taken over.
        """
        self._refuse_superseded(f"{name} is not removed")
        stored = self._stored(name)
        self._remove(name, {g: stored[g] for g in stored if g <= self._generation})

    def remove_incomplete(self, except_names: Iterable[str] = ()) -> None:
        """Removes what killed uploads have left; what a newer start is uploading stays.

        Args:
            except_names: Checkpoints that this start is uploading.

        Raises:
            SupersededError: A later start of the run has taken over.
        """
        self._refuse_superseded("what killed uploads have left is not removed")
        in_progress = {(name, self._generation) for name in except_names}
        for name in self._all_names():
            stored = self._stored(name)
            stay = self._newest_committed(name, stored)
            old = {g: stored[g] for g in stored if g <= self._generation and g != stay}
            self._remove(name, {g: old[g] for g in old if (name, g) not in in_progress})

    @property
    def _generation(self) -> int:
        return 0 if self._claimed is None else self._claimed.generation

    def _starts(self) -> list[_Start]:
        """Returns the starts that have claimed the store, the newest last."""
        found = filter(None, map(_START.fullmatch, self._store.names(_STARTS)))
        return sorted(_Start(int(start[1]), start[2]) for start in found)

    def _refuse_superseded(self, refusal: str, generation: int = 0) -> None:
        """Raises SupersededError if a later start has claimed the store.

        Args:
            refusal: Statement of what is not done then.
            generation: Number of the start that asks, where another process has claimed the store.
        """
        newer = [
            start
            for start in self._starts()
            if (start > self._claimed if self._claimed else start.generation > generation)
        ]
        if not newer:
            return
        by = f"generation {newer[-1].generation}"
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            where = json.loads(self._store.read(newer[-1].path))
            by += f" (host {where['host']}, process {where['pid']})"
        raise SupersededError(
            _KEY,
            self.url,
            f"{refusal}: {by} has taken over",
            "let that one go on, or give this run another run.name and checkpoint.upload",
        )

    def _all_names(self) -> list[str]:
        return sorted(filter(_NAME.fullmatch, self._store.names("")), reverse=True)

    def _stored(self, name: str) -> defaultdict[int, dict[str, int]]:
        """Returns the files that a checkpoint's folder contains, with sizes, by generation."""
        assert _NAME.fullmatch(name), name
        stored: defaultdict[int, dict[str, int]] = defaultdict(dict)
        for path, size_bytes in self._store.sizes(name).items():
            folder, _, file = path.partition("/")
            if found := _GENERATION.fullmatch(folder):
                stored[int(found[1])][file] = size_bytes
            else:
                stored[0][path] = size_bytes
        return stored

    def _locate(self, name: str) -> int | None:
        """Returns the generation of which a checkpoint is; None if it is not committed."""
        found = self._newest_committed(name, self._stored(name))
        self._located.pop(name, None)
        if found is not None:
            self._located[name] = found
        return found

    def _newest_committed(self, name: str, stored: Mapping[int, dict[str, int]]) -> int | None:
        committed = [g for g in stored if self._is_committed(name, g, stored[g])]
        return max(committed, default=None)

    def _is_committed(self, name: str, generation: int, sizes: dict[str, int]) -> bool:
        """Returns whether a manifest is there, and was not put after others removed its files.

        A start that is held up just before it puts the manifest may do so when a newer one has
        already removed its unfinished upload.
        """
        if layout.MANIFEST not in sizes:
            return False
        if generation in (0, self._generation) or (name, generation) in self._whole:
            return True
        try:
            content = self._store.read(f"{_folder(name, generation)}/{layout.MANIFEST}")
            files = _files_of(content)
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError, AttributeError):
            return True  # it is damaged, which `manifest` reports
        if any(file not in sizes for file in files):
            return False
        self._whole.add((name, generation))
        return True

    def _path_of(self, name: str, file: str) -> str:
        """Returns the path of a file, asking where its checkpoint lies only the first time."""
        generation = self._located.get(name)
        if generation is None:
            generation = self._locate(name) or 0
        return f"{_folder(name, generation)}/{file}"

    def _remove(self, name: str, stored: Mapping[int, Iterable[str]]) -> None:
        """Removes some generations of a checkpoint, and nothing of any other.

        Args:
            name: Name of the checkpoint.
            stored: Files by generation.
        """
        # The oldest first, so that at no moment an older one is the newest that is committed.
        for generation in sorted(stored):
            folder = _folder(name, generation)
            self._store.remove(f"{folder}/{layout.MANIFEST}")
            self._whole.discard((name, generation))
            if generation > 0:
                self._store.remove_folder(folder)
                continue
            for file in stored[generation]:  # beside them lie the folders of other generations
                self._store.remove(f"{folder}/{file}")
        self._store.remove_empty(name)

    def _fetch(
        self,
        name: str,
        file: str,
        local: Path,
        entry: Entry,
        beat: Callable[[], None],
    ) -> None:
        path = self._path_of(name, file)
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self._store.size(path) != entry["size_bytes"]:
                raise self._damaged(name, f"{file} has the wrong size")
            self._store.fetch(path, local, entry["size_bytes"], beat)
        except FileNotFoundError as e:
            raise self._damaged(name, f"{file} is missing") from e
        if fault := wrong_content(local, entry):
            raise self._damaged(name, f"{file} {fault}")

    def _damaged(self, name: str, rule: str) -> DamagedError:
        fix = "delete that one, or resume from another checkpoint"
        return DamagedError("resume", f"{self.url}/{name}", rule, fix)


def _folder(name: str, generation: int) -> str:
    """Returns the folder of a checkpoint's files, relative to the URL."""
    return f"{name}/generation-{generation}" if generation else name


def _generation_of(checkpoint: Path) -> int:
    """Returns the start of the run that saved a checkpoint on disk."""
    return int(json.loads((checkpoint / layout.MANIFEST).read_text()).get("generation", 0))


def _files_of(content: bytes) -> Manifest:
    """Returns the files that a manifest lists; raises what JSON of another shape leads to."""
    files: Manifest = {}
    for file, values in json.loads(content)["files"].items():
        entry: Entry = {"size_bytes": int(values["size_bytes"]), "sha256": str(values["sha256"])}
        if "blocks" in values:
            entry["blocks"] = [str(digest) for digest in values["blocks"]]
        files[str(file)] = entry
    return files


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
