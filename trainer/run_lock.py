"""Allows one job at a time in a run directory."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from core.errors import ConfigError
from core.folder import LockHeldError, locked

_LOCK, _OWNER = ".lock", ".lock-owner"
# A file server holds the lock of a lost machine until its lease expires: 90 s on Linux.
_LEASE_S = 120


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Locks the run directory, which is created; a folder that stays empty is removed again.

    The kernel holds the lock, so a killed job leaves none. Between machines it is as reliable as
    the shared file system's: NFS 4, Lustre and GPFS support locks, a mounted bucket does not.

    Raises:
        ConfigError: Another job holds the lock.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    owner = _owner(run_dir)
    elsewhere = owner is not None and owner["host"] != socket.gethostname()
    with ExitStack() as stack:
        try:
            # On the same machine the kernel releases the lock of a dead job at once.
            stack.enter_context(locked(run_dir / _LOCK, timeout_s=_LEASE_S if elsewhere else 0))
        except LockHeldError as e:
            owner = _owner(run_dir)  # read again, since the holder may only now have written it
            who = f" (process {owner['pid']} on {owner['host']})" if owner is not None else ""
            raise ConfigError(
                "run.dir",
                run_dir,
                f"another job is training there{who}",
                "stop that job first, or choose another run.name",
            ) from e
        try:
            me = {"host": socket.gethostname(), "pid": os.getpid()}
            (run_dir / _OWNER).write_text(json.dumps(me))
            yield
        finally:
            (run_dir / _OWNER).unlink(missing_ok=True)
            if {p.name for p in run_dir.iterdir()} <= {_LOCK}:  # nothing else was written
                (run_dir / _LOCK).unlink(missing_ok=True)
                run_dir.rmdir()


def _owner(run_dir: Path) -> dict[str, object] | None:
    """Returns the recorded holder of the lock; None while that is being written."""
    try:
        owner = json.loads((run_dir / _OWNER).read_text())
        return {"host": owner["host"], "pid": owner["pid"]}
    except (OSError, ValueError, KeyError):
        return None
