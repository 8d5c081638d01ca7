"""Files and folders that one stage hands to the next, each committed atomically.

A writer fills a staging folder beside the final one. `commit` syncs it to the disk and renames it
to its final name in one step, so a process may be killed at any instruction: a folder under its
final name is complete, and a staging folder is never read. A manifest lists every file with its
size and SHA-256; the next stage verifies them before it trusts a file.

    with locked(out.with_name(f"{out.name}.lock")), staged_folder(out) as staging:
        ...  # write files into `staging`
        write_lineage(staging, {"code": commit, "parent": parent})
    # `out` is now complete and on the disk
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
from typing import Any, NotRequired, TypedDict

from filelock import FileLock, Timeout

from core import layout
from core.errors import ConfigError

STAGING = ".staging-"  # prefix of the name of everything that is not committed
RUNS = Path("runs")  # parent folder of a run that is given by its name alone

_CHUNK_BYTES = 8 << 20  # large enough for full disk throughput, small enough to be interrupted
_POLL_S = 0.5


class Entry(TypedDict):
    """Describes one file in a manifest.

    Attributes:
        blocks: Digests of the file's blocks, where a reader may want parts of it.
    """

    size_bytes: int
    sha256: str
    blocks: NotRequired[list[str]]


Manifest = dict[str, Entry]  # by path relative to the folder, with `/` between its parts


class LockHeldError(Exception):
    """Reports that another process holds the lock."""


def _nothing() -> None:
    """Does nothing; it is the default of the `between` callbacks."""


# -- digests ---------------------------------------------------------------------------------------


def sha256_of(path: Path, between: Callable[[], None] = _nothing) -> str:
    """Returns the SHA-256 of a file in hexadecimal, reading 8 MiB at a time.

    Args:
        path: The file.
        between: Function called before each chunk; it may raise to cancel the work.
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
        value: JSON value: dicts, lists, strings, numbers, booleans and None.
        separators: Separators as `json.dumps` takes them; stored digests depend on them.
    """
    text = json.dumps(value, sort_keys=True, separators=separators)
    return hashlib.sha256(text.encode()).hexdigest()


def entry_of(path: Path) -> Entry:
    """Returns the manifest entry of a file: its size and its digest."""
    return {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}


def manifest_of(path: Path, wanted: Callable[[Path], bool] = lambda _: True) -> Manifest:
    """Returns a manifest of the files in a folder, with their sizes and digests.

    Args:
        path: Folder, or a single file, which is listed by its name. A missing path lists nothing.
        wanted: Predicate that selects files by path; files that it rejects are not read.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    return {
        file.relative_to(root).as_posix(): entry_of(file)
        for file in files
        if file.is_file() and wanted(file)
    }


def wrong_size(path: Path, entry: Entry) -> str | None:
    """Returns what is wrong with a file's presence or size, or None; does not read the file."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != entry["size_bytes"]:
        return f"has {size} bytes, but {entry['size_bytes']} were written"
    return None


def wrong_content(path: Path, entry: Entry, between: Callable[[], None] = _nothing) -> str | None:
    """Returns what is wrong with a file after reading all of it, or None.

    Args:
        path: The file.
        entry: Entry of the file in the manifest.
        between: Function called before each chunk; see `sha256_of`.
    """
    if fault := wrong_size(path, entry):
        return fault
    return None if sha256_of(path, between) == entry["sha256"] else "does not match its SHA-256"


def write_lineage(folder: Path, origin: Mapping[str, Any]) -> None:
    """Writes `lineage.json`, which records the origin of a folder and lists its files.

    Args:
        folder: Uncommitted folder that already holds all its other files.
        origin: Origin of the folder: code, settings, data, parent.
    """
    lineage = {"format_version": 1, **origin, "files": manifest_of(folder)}
    (folder / layout.LINEAGE).write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")


# -- writing ---------------------------------------------------------------------------------------


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there replaces `path` atomically.

    Args:
        path: Final path of the file; its folder exists.
    """
    # Several processes may write the same file. Each has its own temporary name, so the last
    # rename wins and no writer sees a partial file of another.
    staging = path.with_name(f"{STAGING}{path.name}.{secrets.token_hex(4)}")
    try:
        yield staging
        sync(staging)
        staging.replace(path)
        sync(path.parent)  # a rename is durable only once its directory is on the disk
    finally:
        staging.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replaces a file atomically: a reader sees the old content or the new content, never a mix.

    Args:
        path: Path of the file; its folder exists.
        content: New content; text is encoded as UTF-8.
        mode: File permissions, from which the umask is removed. 0o600 keeps secrets private.
    """
    data = content.encode() if isinstance(content, str) else content
    with staged_file(path) as staging:
        # The mode is set when the file is created: a later chmod would leave a moment in which
        # others can open it. O_EXCL fails on a file that somebody else put there.
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:
            file.write(data)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file and syncs it to the disk.

    A crash may tear the last line, so readers skip a line that does not parse. The file is closed
    after each line because a mounted bucket uploads a file only when it is closed.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staged_folder(final: Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder, which becomes `final` when the block ends without an error.

    Only one process may write at a time: hold a lock where several could.

    Args:
        final: Path of the folder to create; missing parents are created.
        replace: True replaces a folder that exists.

    Raises:
        OSError: The folder cannot be written. Nothing is left behind.
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
    """Writes a file and computes its digest on the way, without reading the file again.

    Args:
        path: Path of the file, which is created or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size_bytes = path, 0
        self._file, self._sha256 = path.open("wb"), hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Appends bytes to the file and updates the digest."""
        self._file.write(data)
        self._sha256.update(data)
        self.size_bytes += len(data)

    def finish(self) -> Entry:
        """Syncs the file to the disk, closes it, and returns its manifest entry."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return {"size_bytes": self.size_bytes, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        """Closes the file without syncing it."""
        self._file.close()


def staging_of(final: Path) -> Path:
    """Returns the path at which a folder or file is written before it is committed."""
    return final.with_name(f"{STAGING}{final.name}")


def commit(staging: Path, final: Path, replace: bool = False) -> None:
    """Syncs a folder to the disk and renames it to its final name.

    Args:
        staging: Complete folder on the same file system as `final`.
        final: Path under which readers look for the folder.
        replace: True replaces a folder that exists.
    """
    # Contents first, then the rename: after a power loss a file system may have kept the rename and
    # lost the data.
    for path in sorted(staging.rglob("*")):
        sync(path)
    sync(staging)
    replaced = staging.with_name(f"{staging.name}-replaced")
    if replace and final.exists():
        remove(replaced)
        # Deleting in place could be interrupted, and what was left would look complete.
        final.rename(replaced)
    staging.rename(final)
    sync(final.parent)
    if replace:
        remove(replaced)


def remove(path: Path) -> None:
    """Removes a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_uncommitted(folder: Path) -> None:
    """Removes what killed processes left in a folder; no process may be writing to it."""
    for path in folder.glob(f"{STAGING}*"):
        remove(path)


def sync(path: Path) -> None:
    """Syncs a file's content, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading ---------------------------------------------------------------------------------------


def read_json(key: str, path: Path, fix: str) -> Any:
    """Returns the content of a JSON file that the user provides.

    Args:
        key: Setting that names the file, used in the error.
        path: Path of the file.
        fix: Advice for a file that is not JSON.

    Raises:
        ConfigError: The file cannot be read, or is not JSON.
    """
    if path.exists() and not path.is_file():  # reading a pipe would block until it has a writer
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
    """Holds a lock file while the block runs; the kernel releases it when the process ends.

    Between machines the lock is as reliable as the shared file system's: NFS 4, Lustre and GPFS
    support locks, a mounted bucket does not.

    Args:
        path: Path of the lock file, which stays afterwards.
        timeout_s: Longest wait for another holder, in seconds; None waits without limit.
        between: Function called twice a second while waiting; it may raise to stop waiting.
        mode: Permissions of the lock file.

    Raises:
        LockHeldError: Another process still holds the lock after `timeout_s`.
    """
    lock = FileLock(path, mode=mode)
    waited_s = 0.0
    while True:
        between()
        try:
            # Short waits instead of one long one, so that `between` runs while the lock is taken.
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
    """Returns the directory of a run, or None where there is none.

    Args:
        name: Path of the run, or its name under `runs/`.
        holds: File or folder that the directory must contain.
    """
    given = Path(name).expanduser()
    return next((path for path in (given, RUNS / given) if (path / holds).exists()), None)
