"""Files and folders that one stage hands to the next, each committed whole.

A writer fills a staging folder beside the final one. `commit` forces it to the disk and gives it
its name with one rename, so that a process may be killed at any instruction: what has its name is
complete, and what has not is never read. A manifest lists every file with its size and SHA-256;
the next stage compares them before it trusts a file.

    with locked(out.with_name(f"{out.name}.lock")), staged_folder(out) as staging:
        ...  # write files into `staging`
        write_lineage(staging, {"code": commit, "parent": parent})
    # `out` is there, whole and on the disk
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from filelock import FileLock, Timeout

from core.errors import ConfigError

STAGING = ".staging-"  # how the name of everything begins that is not committed
MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
RUNS = Path("runs")  # where a run lies that is given by its name alone

_CHUNK_BYTES = 8 << 20
_POLL_S = 0.5


class Entry(TypedDict):
    """What a manifest says of one file."""

    size_bytes: int
    sha256: str


Manifest = dict[str, Entry]  # by path relative to the folder, with `/` between its parts


class LockHeldError(Exception):
    """Another process holds the lock."""


def _nothing() -> None:
    """Does nothing: the default of what is called between two pieces of work."""


# -- digests ---------------------------------------------------------------------------------------


def sha256_of(path: Path, between: Callable[[], None] = _nothing) -> str:
    """Returns the SHA-256 of a file in hexadecimal, reading 8 MiB at a time.

    Args:
        path: The file.
        between: Called before each piece; it may raise to give up.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            between()
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: object, separators: tuple[str, str] | None = None) -> str:
    """Returns the SHA-256 of a JSON value, whatever the order of its keys.

    Args:
        value: Made of JSON's types.
        separators: As `json.dumps` takes them; digests that are stored somewhere depend on them.
    """
    text = json.dumps(value, sort_keys=True, separators=separators)
    return hashlib.sha256(text.encode()).hexdigest()


def entry_of(path: Path) -> Entry:
    """Returns the size and the digest of a file."""
    return {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}


def manifest_of(path: Path, wanted: Callable[[Path], bool] = lambda _: True) -> Manifest:
    """Lists the files of a folder with their sizes and digests.

    Args:
        path: A folder; or a file, which is listed by its name. What is absent has no files.
        wanted: Chooses files by their paths; the others are not read.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    return {
        file.relative_to(root).as_posix(): entry_of(file)
        for file in files
        if file.is_file() and wanted(file)
    }


def wrong_size(path: Path, entry: Entry) -> str | None:
    """Says what is wrong with a file without reading it, or returns None."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != entry["size_bytes"]:
        return f"has {size} bytes, but {entry['size_bytes']} were written"
    return None


def wrong_content(path: Path, entry: Entry, between: Callable[[], None] = _nothing) -> str | None:
    """Says what is wrong with a file, which is read to its end, or returns None.

    Args:
        path: The file.
        entry: What the manifest says of it.
        between: See `sha256_of`.
    """
    if fault := wrong_size(path, entry):
        return fault
    return None if sha256_of(path, between) == entry["sha256"] else "does not match its SHA-256"


def write_lineage(folder: Path, origin: Mapping[str, Any]) -> None:
    """Writes `lineage.json`, which says where a folder comes from and lists its files.

    Args:
        folder: Everything else is in it already; it is not committed yet.
        origin: What it was made from (code, settings, data, parent).
    """
    lineage = {"format_version": 1, **origin, "files": manifest_of(folder)}
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")


# -- writing ---------------------------------------------------------------------------------------


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write a file to, which then replaces `path` in one step.

    Args:
        path: The file; its folder is there.
    """
    # Several processes may write the same file; the last one wins, and none sees another's half.
    staging = path.with_name(f"{STAGING}{path.name}.{secrets.token_hex(4)}")
    try:
        yield staging
        sync(staging)
        staging.replace(path)
        sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replaces a file in one step: a reader sees the old content or the new one, never a part.

    Args:
        path: The file; its folder is there.
        content: Text is encoded as UTF-8.
        mode: Permissions, of which the umask is taken off. 0o600 keeps secrets from other users.
    """
    data = content.encode() if isinstance(content, str) else content
    with staged_file(path) as staging:
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:
            file.write(data)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file and waits until the disk has it.

    A crash may tear the last line, so a reader leaves out what cannot be parsed. The file is closed
    each time: a mounted bucket sends a file on its way when it is closed.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staged_folder(final: Path, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder to fill, which becomes `final` when the block ends without an error.

    One writer at a time: where there may be several, hold a lock.

    Args:
        final: The folder to make; its parents are made if need be.
        replace: Put it in the place of one that is there.

    Raises:
        OSError: It cannot be written. Nothing of it stays.
    """
    staging = staging_of(final)
    remove(staging)  # left by a process that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
        commit(staging, final, replace)
    except BaseException:
        remove(staging)
        raise


class HashedFile:
    """A file whose digest is known when it is finished, without reading it again.

    Args:
        path: The file, which is made or emptied.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size_bytes = path, 0
        self._file, self._sha256 = path.open("wb"), hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        self._file.write(data)
        self._sha256.update(data)
        self.size_bytes += len(data)

    def finish(self) -> Entry:
        """Forces the file to the disk, closes it, and returns its entry for a manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return {"size_bytes": self.size_bytes, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        """Closes the file as it is."""
        self._file.close()


def staging_of(final: Path) -> Path:
    """Returns where a folder or file is written before it is committed."""
    return final.with_name(f"{STAGING}{final.name}")


def commit(staging: Path, final: Path, replace: bool = False) -> None:
    """Forces a folder to the disk and gives it its final name.

    Args:
        staging: A complete folder, in the same file system.
        final: The name that readers look for.
        replace: Put it in the place of a folder that is there.
    """
    for path in sorted(staging.rglob("*")):
        sync(path)
    sync(staging)
    replaced = staging.with_name(f"{staging.name}-replaced")
    if replace and final.exists():
        remove(replaced)
        final.rename(replaced)  # in one step: one half of it would look whole
    staging.rename(final)
    sync(final.parent)
    if replace:
        remove(replaced)


def remove(path: Path) -> None:
    """Removes a file or a folder that need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_uncommitted(folder: Path) -> None:
    """Removes what killed processes have left in a folder; nobody may be writing to it."""
    for path in folder.glob(f"{STAGING}*"):
        remove(path)


def sync(path: Path) -> None:
    """Waits until the disk has a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading ---------------------------------------------------------------------------------------


def read_json(key: str, path: Path, fix: str) -> Any:
    """Returns what is in a JSON file that somebody handed us.

    Args:
        key: The setting that names the file, for the error.
        path: The file.
        fix: What to do about a file that is not JSON.

    Raises:
        ConfigError: It cannot be read, or is not JSON.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes to it
        raise ConfigError(key, path, "is not a file", fix)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(key, path, e.strerror or str(e), "check the path") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(key, path, f"is not JSON ({e})", fix) from e


# -- locking and finding ---------------------------------------------------------------------------


@contextmanager
def locked(
    path: Path,
    timeout_s: float | None = None,
    between: Callable[[], None] = _nothing,
    mode: int = 0o644,
) -> Iterator[None]:
    """Holds a lock file, which the kernel releases when the process ends, however it ends.

    Between machines it is as good as the shared file system's: NFS 4, Lustre and GPFS have locks,
    a mounted bucket has none.

    Args:
        path: The lock file; it stays afterwards.
        timeout_s: How long to wait for another holder; None: for ever.
        between: Called twice a second while waiting; it may raise to give up.
        mode: Permissions of the file.

    Raises:
        LockHeldError: Another process still holds it.
    """
    lock = FileLock(path, mode=mode)
    waited_s = 0.0
    while True:
        between()
        try:
            step_s = _POLL_S if timeout_s is None else min(_POLL_S, timeout_s - waited_s)
            lock.acquire(timeout=max(0.0, step_s))
            break
        except Timeout as e:
            waited_s += _POLL_S
            if timeout_s is not None and waited_s >= timeout_s:
                raise LockHeldError(str(path)) from e
    try:
        yield
    finally:
        lock.release()


def find_run(name: str, holds: str) -> Path | None:
    """Finds a run directory, or returns None.

    Args:
        name: Its path, or its name under `runs/`.
        holds: A file or folder that it must have.
    """
    given = Path(name).expanduser()
    return next((path for path in (given, RUNS / given) if (path / holds).exists()), None)
