"""Tells a process that does nothing from one that a busy host does not let do anything.

Sources: proc_pid_stat(5), and Documentation/scheduler/sched-stats.rst of Linux.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

LOOK_S = 0.25  # between two looks at a process
_LATE_S = 0.15  # beyond it this process stood still itself, which says nothing of the other
_NANOSECONDS = 1e9


class Look(NamedTuple):
    """What a look at a process shows.

    Attributes:
        had_s: Seconds since the last look that the process had for whatever it does: without those
            that it waited for a CPU, and those that this process was too late to look.
        still_s: Seconds that it had in a row in which it said nothing, used no CPU time and waited
            for nothing.
        silent_s: Seconds that it had since it said something.
    """

    had_s: float
    still_s: float
    silent_s: float


class _Threads(NamedTuple):
    """The threads of a process, all together.

    Attributes:
        used_s: CPU time of those that are there, in seconds.
        waited_s: Seconds that each waited for a CPU, by thread; a wait counts once it is over.
        wants: Whether one of them runs, waits for a CPU, or for a disk.
    """

    used_s: float
    waited_s: dict[str, float]
    wants: bool


class Liveness:
    """Looks at a process every `LOOK_S`.

    Args:
        pid: The process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._still_s = self._silent_s = 0.0
        self._looked_s = self._heard_s = time.monotonic()
        self._threads = _Threads(0.0, {}, False)

    def look(self, heard_s: float) -> Look:
        """Returns how the process fares.

        On a host with more to do than it can, both this process and the other stand still now and
        then, and neither is a sign that the other hangs.

        Args:
            heard_s: When it said something for the last time, by the monotonic clock.
        """
        now_s, before = time.monotonic(), self._threads
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        threads = self._threads = _threads_of(self._pid)
        waited_s = [s - before.waited_s.get(name, 0.0) for name, s in threads.waited_s.items()]
        has_waited = max(waited_s, default=0.0) > 0
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
    """Returns the threads of a process; where that is unknown, those of one that sleeps."""
    used_s, waited_s, wants = 0.0, {}, False
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            used, waited, _ = map(int, (task / "schedstat").read_text().split())
        except (OSError, ValueError, IndexError):  # it ended, or this system does not say
            continue
        used_s += used / _NANOSECONDS
        waited_s[task.name] = waited / _NANOSECONDS
        wants = wants or state in "RD"
    return _Threads(used_s, waited_s, wants)
