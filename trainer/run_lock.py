"""One job at a time in a run directory."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from monitoring.errors import ConfigError

_LOCK, _OWNER = ".lock", ".lock-owner"


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Holds the run directory, which is created; a folder that stays empty is removed again.

    The kernel holds the lock, so a killed job leaves none. Between machines it is as good as the
    shared file system's: NFS 4, Lustre and GPFS have it, a mounted bucket has not.

    Raises:
        ConfigError: If another job has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise ConfigError(
            "run.dir",
            run_dir,
            f"another job is training there{_owner(run_dir)}",
            "stop that one first, or choose another run.name",
        ) from e
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        (run_dir / _OWNER).write_text(json.dumps(owner))
        yield
    finally:
        (run_dir / _OWNER).unlink(missing_ok=True)
        if {p.name for p in run_dir.iterdir()} <= {_LOCK}:
            (run_dir / _LOCK).unlink(missing_ok=True)
            run_dir.rmdir()
        lock.release()


def _owner(run_dir: Path) -> str:
    try:
        owner = json.loads((run_dir / _OWNER).read_text())
        return f" (process {owner['pid']} on {owner['host']})"
    except (OSError, ValueError, KeyError):
        return ""  # it has just begun or just ended
