"""Ports for servers that a test starts later, or again."""

import fcntl
import random
import socket
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from parallel.launcher import SUPERVISOR_PORT

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port():
    """A port that is free now and that the kernel gives to nobody.

    One from `bind(0)` goes to some client of another test as soon as it is free.
    """
    lowest = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 49152
    for port in random.SystemRandom().sample(range(10_000, max(lowest, 20_000)), 100):
        if _is_free(port):
            return port
    raise AssertionError("no port is free")


@contextmanager
def supervisor_port():
    """Keeps the port at which a supervisor of several machines listens for one test at a time.

    Other tests of this machine, also of other copies of this repository, wait.
    """
    with (Path(tempfile.gettempdir()) / "spotforge-tests-supervisor-port").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        deadline_s = time.monotonic() + 300
        while not _is_free(SUPERVISOR_PORT):
            assert time.monotonic() < deadline_s, f"port {SUPERVISOR_PORT} is in use"
            time.sleep(0.05)
        yield


def _is_free(port):
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
        return True
