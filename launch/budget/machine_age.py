"""The age of this machine: a rented one is paid for since its boot, not since our start."""

import os
import socket
from pathlib import Path

from core.errors import ConfigError


def machine_age() -> tuple[str, float]:
    """Returns an identifier of the machine since its last boot, and its age in seconds.

    The age is that of process 1, which is the machine's or the container's: inside a container
    `/proc/uptime` shows the uptime of the host.

    Raises:
        ConfigError: The system is not Linux.
    """
    try:
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
        # Fields are split after the program's name, which may contain spaces.
        fields = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as e:
        rule = f"the age of this machine is unknown ({e.strerror})"
        raise ConfigError("--since-boot", True, rule, "leave it out") from e
    began_ticks = int(fields[19])  # `starttime`, field 22 of proc_pid_stat(5)
    age_s = max(0.0, uptime_s - began_ticks / os.sysconf("SC_CLK_TCK"))
    return f"{socket.gethostname()}/{boot}/{began_ticks}", age_s
