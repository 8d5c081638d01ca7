"""Builds a folder exactly once, for any number of processes and in spite of kills."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import ConfigError
from core.folder import locked, staged_folder
from trainer.data.files import StopRequested, check_stop

KEY = "data.cache_dir"


def cache_folder(cache_dir: str) -> Path:
    """Returns the absolute path of the cache folder, which may not exist."""
    return Path(cache_dir).expanduser().absolute()


def open_cache(cache_dir: str) -> Path:
    """Returns the cache folder, which is created if missing.

    Raises:
        ConfigError: The folder cannot be created or written to.
    """
    folder = cache_folder(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(KEY, folder, f"cannot be made: {error}", "give another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(KEY, folder, "is not writable", "give another folder")
    return folder


@contextmanager
def full_disk_explained(cache: Path) -> Iterator[None]:
    """Turns a full disk into an error that names the setting to change."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        rule = f"the disk is full ({error.strerror})"
        fix = "free some space or name a folder on a larger disk"
        raise ConfigError(KEY, cache, rule, fix) from error


def build_once(folder: Path, build: Callable[[Path], None], stop_requested: StopRequested) -> None:
    """Makes a complete `folder` exist: the first caller builds it, the others wait for it.

    Args:
        folder: Folder inside the cache. Its name identifies its content, so an existing folder is
            never rebuilt.
        build: Function that fills an empty folder.
        stop_requested: Function that is polled while waiting; `build` polls on its own.

    Raises:
        ConfigError: The disk is full.
    """
    if folder.exists():
        return
    lock = folder.with_name(f"{folder.name}.lock")
    with locked(lock, between=lambda: check_stop(stop_requested)):
        if folder.exists():  # another process built it while this one waited for the lock
            return
        with full_disk_explained(folder.parent), staged_folder(folder) as staging:
            build(staging)
