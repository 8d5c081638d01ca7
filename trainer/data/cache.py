"""Build a folder exactly once, however many processes ask for it, however often they are killed."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from core.errors import ConfigError
from trainer.data.files import StopRequested, check_stop
from trainer.data.writer import sync_folder

KEY = "data.cache_dir"
POLL_S = 0.5


def open_cache(cache_dir: str) -> Path:
    """The cache folder, made if need be.

    Raises:
        ConfigError: It cannot be made or written to.
    """
    folder = Path(cache_dir).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(KEY, folder, f"cannot be made: {error}", "give another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(KEY, folder, "no permission to write there", "give another folder")
    return folder


@contextmanager
def full_disk_explained(cache: Path) -> Iterator[None]:
    """Says which setting to change when there is no room left."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        rule = f"the disk is full ({error.strerror})"
        fix = "free some space or name a folder on a larger disk"
        raise ConfigError(KEY, cache, rule, fix) from error


@contextmanager
def locked(path: Path, stop_requested: StopRequested) -> Iterator[None]:
    """Hold a lock that the operating system takes back when its holder dies.

    Raises:
        Interrupted: Told to stop while another process held it.
    """
    lock = FileLock(path)
    while True:
        check_stop(stop_requested)
        try:
            lock.acquire(timeout=POLL_S)
            break
        except Timeout:
            continue
    try:
        yield
    finally:
        lock.release()


def build_once(folder: Path, build: Callable[[Path], None], stop_requested: StopRequested) -> None:
    """Make `folder` exist, complete. The first caller builds it aside and renames; the others wait.

    Args:
        folder: Inside the cache; its name says what is in it, so an existing one is never rebuilt.
        build: Fills the empty folder it is given and forces it to the disk.
        stop_requested: Polled while waiting; `build` polls on its own.

    Raises:
        ConfigError: The disk is full.
    """
    if folder.exists():
        return
    with locked(folder.with_name(f"{folder.name}.lock"), stop_requested):
        if folder.exists():
            return
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a builder that was killed
        try:
            with full_disk_explained(folder.parent):
                temporary.mkdir()
                build(temporary)
                os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(folder.parent)
