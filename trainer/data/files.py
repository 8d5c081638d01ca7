"""Finds the files of a source, and computes their digests.

Prepared data is addressed by these digests. Reading 1 TB at every start to learn that nothing
changed is too expensive, so digests are cached by (path, size, modification time).
"""

import codecs
import glob
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError, Interrupted
from core.folder import write_file

CHUNK_BYTES = 8 << 20
BOM = b"\xef\xbb\xbf"  # byte order mark that some editors put before UTF-8; not part of the text
UTF_16_BOMS = (b"\xff\xfe", b"\xfe\xff")

StopRequested = Callable[[], bool]


@dataclass(frozen=True)
class SourceFile:
    """Describes one file of a source.

    Attributes:
        path: Path relative to the folder, repository or library, with `/` between parts.
        size_bytes: Size of the file.
        sha256: Hexadecimal digest; `git:<sha1>` for a small file of a hub repository, for which the
            hub has no SHA-256.
        has_bom: True if its text begins with a byte order mark.
    """

    path: str
    size_bytes: int
    sha256: str
    has_bom: bool = False


def check_stop(stop_requested: StopRequested) -> None:
    """Raises Interrupted if the process was told to stop."""
    if stop_requested():
        raise Interrupted(
            "told to stop while preparing data; no partial result was kept; "
            "run the same command again"
        )


def list_files(
    key: str, path: str, extensions: tuple[str, ...] | None, *, follow_links: bool = True
) -> list[tuple[str, Path]]:
    """Returns the files that `path` names, sorted by relative path.

    Args:
        key: Configuration key to name in errors, e.g. `data.path`.
        path: File (of any extension), folder (searched recursively, without hidden files and
            folders) or glob (`**` allowed).
        extensions: Extensions of the files to take from a folder; None takes every file.
        follow_links: True also searches the folders that links in a folder lead to.

    Returns:
        Pairs (path relative to the folder or to the fixed part of the glob, absolute path).

    Raises:
        ConfigError: There is no file, no file of a kind that can be read, a broken link, or a
            folder that cannot be searched.
    """
    root = Path(path).expanduser().absolute()
    if root.is_file():
        return [(root.name, root)]
    if root.is_dir():
        return _files_of_folder(key, path, root, extensions, follow_links)
    if not glob.has_magic(path):
        if root.is_symlink():
            raise _broken(key, path, [root.name])
        raise ConfigError(key, path, "no such file or folder", "give a path that exists")
    found = [Path(name) for name in glob.glob(str(root), recursive=True)]
    fixed = root
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    names = sorted((file.relative_to(fixed).as_posix(), file) for file in found)
    if broken := [name for name, file in names if file.is_symlink() and not file.exists()]:
        raise _broken(key, path, broken)
    files = [(name, file) for name, file in names if file.is_file()]
    if not files:
        raise ConfigError(key, path, "the glob matches no file", "quote it and check it with ls")
    return files


def _files_of_folder(
    key: str, path: str, root: Path, extensions: tuple[str, ...] | None, follow_links: bool
) -> list[tuple[str, Path]]:
    files: list[tuple[str, Path]] = []
    broken: list[str] = []

    def search(folder: Path, above: set[str]) -> None:
        real = os.path.realpath(folder)
        if real in above:  # a link to one of the folders that contain it, an endless loop
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                file = folder / entry.name
                if entry.is_dir(follow_symlinks=follow_links):
                    search(file, above | {real})
                    continue
                wanted = extensions is None or entry.name.endswith(extensions)
                if wanted and entry.is_file():
                    files.append((file.relative_to(root).as_posix(), file))
                # A broken link without an extension may have led to a folder of such files.
                elif (wanted or not file.suffix) and file.is_symlink() and not file.exists():
                    broken.append(file.relative_to(root).as_posix())

    try:
        search(root, set())
    except OSError as error:
        raise ConfigError(key, path, f"cannot be searched: {error}", "allow it") from error
    if broken:
        raise _broken(key, path, sorted(broken))
    if not files:
        wanted = "file" if extensions is None else f"file ending in {', '.join(extensions)}"
        raise ConfigError(key, path, f"the folder holds no {wanted}", "name the files with a glob")
    return sorted(files)


def _broken(key: str, path: str, names: list[str]) -> ConfigError:
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    rule = f"has broken links: {shown}"
    return ConfigError(key, path, rule, "repair or remove them")


class FileDigests:
    """Computes SHA-256 of local files and caches them in `<cache_dir>/digests.json`; needs a lock.

    Args:
        cache_file: File in which digests are stored between runs.
        stop_requested: Function that is polled while reading.
    """

    def __init__(self, cache_file: Path, stop_requested: StopRequested) -> None:
        self._cache_file = cache_file
        self._stop_requested = stop_requested
        self._changed = False
        try:
            self._known: dict[str, list[Any]] = json.loads(cache_file.read_text())
        except (FileNotFoundError, ValueError):  # an unreadable cache is computed again
            self._known = {}

    def file(self, key: str, name: str, path: Path, *, is_text: bool) -> SourceFile:
        """Returns a file with its digest; with `is_text` it must be UTF-8 without NUL bytes.

        Raises:
            ConfigError: The file cannot be read, or is not text.
        """
        try:
            status = path.stat()
            # The kind of check is cached with the digest: a cached text has passed its check.
            entry = ["text" if is_text else "bytes", status.st_size, status.st_mtime_ns]
            known = self._known.get(str(path))
            if known is None or known[:3] != entry:
                known = [*entry, self._read(key, path, is_text)]
                self._known[str(path)] = known
                self._changed = True
            if is_text and len(known) == 4:  # an entry from before byte order marks were recorded
                with path.open("rb") as file:
                    known.append(file.read(len(BOM)) == BOM)
                self._changed = True
        except OSError as error:
            raise ConfigError(key, path, f"cannot be read: {error}", "fix the file") from error
        return SourceFile(name, status.st_size, known[3], is_text and known[4])

    def save(self) -> None:
        """Saves the computed digests in one atomic step."""
        if self._changed:
            write_file(self._cache_file, json.dumps(self._known))

    def _read(self, key: str, path: Path, is_text: bool) -> str:
        digest = hashlib.sha256()
        check = _TextCheck(key, path) if is_text else None
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                check_stop(self._stop_requested)
                digest.update(chunk)
                if check:
                    check.update(chunk)
        if check:
            check.finish()
        return digest.hexdigest()


class _TextCheck:
    """Finds the first byte of a file that cannot be part of a text."""

    def __init__(self, key: str, path: Path) -> None:
        self._key, self._path, self._offset = key, path, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def update(self, chunk: bytes) -> None:
        if self._offset == 0 and chunk.startswith(UTF_16_BOMS):
            fix = "convert the file to UTF-8 or leave it out"
            raise ConfigError(self._key, self._path, "is in UTF-16, not in UTF-8", fix)
        if (position := chunk.find(0)) >= 0:
            self._fail(self._offset + position, "a NUL byte: this is a binary file")
        self._decode(chunk, final=False)
        self._offset += len(chunk)

    def finish(self) -> None:
        self._decode(b"", final=True)

    def _decode(self, chunk: bytes, final: bool) -> None:
        pending = len(self._decoder.getstate()[0])  # bytes of a character that the chunk cut
        try:
            self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            self._fail(self._offset - pending + error.start, "not UTF-8")

    def _fail(self, offset: int, what: str) -> None:
        rule = f"byte {offset} is {what}"
        raise ConfigError(self._key, self._path, rule, "convert the file to UTF-8 or leave it out")
