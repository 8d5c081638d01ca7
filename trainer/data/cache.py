"""Build a folder exactly once, however many processes ask for it, however often they are killed."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import ConfigError
from core.folder import locked, staged_folder
from trainer.data.files import StopRequested, check_stop

KEY = "data.cache_dir"


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


def build_once(folder: Path, build: Callable[[Path], None], stop_requested: StopRequested) -> None:
    """Make `folder` exist, complete. The first caller builds it aside and renames; the others wait.

    Args:
        folder: Inside the cache; its name says what is in it, so an existing one is never rebuilt.
        build: Fills the empty folder it is given.
        stop_requested: Polled while waiting; `build` polls on its own.

    Raises:
        ConfigError: The disk is full.
    """
    if folder.exists():
        return
    lock = folder.with_name(f"{folder.name}.lock")
    with locked(lock, between=lambda: check_stop(stop_requested)):
        if folder.exists():
            return
        with full_disk_explained(folder.parent), staged_folder(folder) as staging:
            build(staging)
