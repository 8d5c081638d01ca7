"""How long this machine has been up: a rented one is paid for from then on, not from our start."""

import os
import socket
from pathlib import Path

from core.errors import ConfigError


def machine_age() -> tuple[str, float]:
    """A name for this life of the machine, and its age in seconds.

    Process 1 is the machine's, or the container's where this runs in one: its age is what counts,
    since a container sees the uptime of its host.

    Raises:
        ConfigError: This is no Linux.
    """
    try:
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
        # Fields are counted after the program's name, which may have spaces in it.
        fields = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as e:
        rule = f"the age of this machine is unknown ({e.strerror})"
        raise ConfigError("--since-boot", True, rule, "leave it out") from e
    began_ticks = int(fields[19])  # `starttime`, field 22 of proc_pid_stat(5)
    age_s = max(0.0, uptime_s - began_ticks / os.sysconf("SC_CLK_TCK"))
    return f"{socket.gethostname()}/{boot}/{began_ticks}", age_s
