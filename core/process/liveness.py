"""Tells a process that hangs from one that a busy host does not schedule.

Sources: proc_pid_stat(5), and Documentation/scheduler/sched-stats.rst of Linux.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

LOOK_S = 0.25  # interval between two looks at a process
_LATE_S = 0.15  # a look later than this means that this process was not scheduled either
_NANOSECONDS = 1e9


class Look(NamedTuple):
    """Holds what one look at a process shows.

    Attributes:
        had_s: Seconds since the last look in which the process could run: without the time it
            waited for a CPU, and without intervals in which this process itself was late to look.
        still_s: Consecutive seconds in which it could run but sent nothing, used no CPU time and
            waited for nothing.
        silent_s: Seconds in which it could run since it last sent something.
    """

    had_s: float
    still_s: float
    silent_s: float


class _Threads(NamedTuple):
    """Sums up the threads of a process.

    Attributes:
        used_s: CPU time of the current threads, in seconds.
        waited_s: Time that each thread waited for a CPU, in seconds, by thread id; the kernel
            counts a wait once it is over.
        wants: True if a thread runs, waits for a CPU, or waits for a disk.
    """

    used_s: float
    waited_s: dict[str, float]
    wants: bool


class Liveness:
    """Watches a process, which is to be looked at every `LOOK_S`.

    Args:
        pid: Process id of the watched process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._still_s = self._silent_s = 0.0
        self._looked_s = self._heard_s = time.monotonic()
        self._threads = _Threads(0.0, {}, False)

    def look(self, heard_s: float) -> Look:
        """Returns how the process has fared since the last look.

        On an overloaded host both this process and the watched one stand still now and then, which
        is not a sign that the watched one hangs.

        Args:
            heard_s: Time at which it last sent something, by the monotonic clock.
        """
        now_s, before = time.monotonic(), self._threads
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        threads = self._threads = _threads_of(self._pid)
        waited_s = [s - before.waited_s.get(name, 0.0) for name, s in threads.waited_s.items()]
        has_waited = max(waited_s, default=0.0) > 0
        # The longest wait of a thread counts in full: with more work than CPUs, the thread that
        # matters may be the one that waits.
        is_late = passed_s > LOOK_S + _LATE_S
        had_s = 0.0 if is_late else max(0.0, passed_s - max(waited_s, default=0.0))
        if heard_s != self._heard_s:
            self._heard_s, self._silent_s = heard_s, 0.0
        else:
            self._silent_s += had_s
        if self._silent_s == 0 or threads.wants or has_waited or threads.used_s != before.used_s:
            self._still_s = 0.0
        else:
            self._still_s += had_s
        return Look(had_s, self._still_s, self._silent_s)


def _threads_of(pid: int) -> _Threads:
    """Returns the threads of a process; where the system does not tell, those of an idle one."""
    used_s, waited_s, wants = 0.0, {}, False
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            # The command's name may contain spaces and parentheses; the state follows the last ")".
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            used, waited, _ = map(int, (task / "schedstat").read_text().split())
        except (OSError, ValueError, IndexError):  # the thread ended, or the system lacks schedstat
            continue
        used_s += used / _NANOSECONDS
        waited_s[task.name] = waited / _NANOSECONDS
        wants = wants or state in "RD"
    return _Threads(used_s, waited_s, wants)
