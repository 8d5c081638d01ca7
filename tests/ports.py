"""Ports for servers that a test starts later, or again."""

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port():
    """A port that is free now and that the kernel gives to nobody.

    One from `bind(0)` goes to some client of another test as soon as it is free.
    """
    lowest = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 49152
    for port in random.SystemRandom().sample(range(10_000, max(lowest, 20_000)), 100):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
