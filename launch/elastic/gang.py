"""The ranks that one machine runs in one generation: processes, and the files that they leave.

Each rank finds a folder of its own in SPOTFORGE_RANK_DIR, in which it may write

    heartbeat        `train 12`, again at every poll point; the time of the file is that of the beat
    stack.txt        the stacks of its threads, on SIGUSR2
    stop_reason.txt  one line: why this rank, and not only the others, was told to stop
    error.txt        a traceback, before it exits with 1
"""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

from core.process.child import Child
from core.process.python import USERS_PATH
from launch.elastic.protocol import MAX_TEXT_CHARS, RankStatus, Start

_STACKS_S = 3.0
_STACKS_SETTLED_S = 0.3
_NOT_STARTED = 127  # as a shell says it


class Gang:
    """Starts the ranks of this machine, watches and signals them.

    Args:
        command: What each rank runs.
        start: Which ranks, of how many, and where they meet.
        folder: Where the folders of the ranks are made.
    """

    def __init__(self, command: Sequence[str], start: Start, folder: Path) -> None:
        self.generation = start.generation
        self._ranks = [_Rank(command, start, local, folder) for local in range(start.nproc)]

    def status(self) -> list[RankStatus]:
        """How each rank is now; times are those of `time.monotonic()`."""
        return [rank.look() for rank in self._ranks]

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to every rank that runs; SIGKILL goes to what they started as well."""
        for rank in self._ranks:
            rank.signal(number)

    async def stacks(self) -> list[str]:
        """The stacks of all threads of each rank; empty for one that does not tell."""
        for rank in self._ranks:
            rank.ask_for_stack()
        started = changed = time.monotonic()
        sizes = [0] * len(self._ranks)
        while (now := time.monotonic()) < started + _STACKS_S:
            await asyncio.sleep(0.05)
            before, sizes = sizes, [rank.stack_bytes() for rank in self._ranks]
            if sizes != before:
                changed = now
            elif all(sizes) and now > changed + _STACKS_SETTLED_S:
                break
        return [rank.read("stack.txt") or "" for rank in self._ranks]

    def close(self) -> None:
        """Kills what still runs, and removes the folders."""
        self.signal(signal.SIGKILL)
        for rank in self._ranks:
            rank.close()


class _Rank:
    def __init__(self, command: Sequence[str], start: Start, local_rank: int, folder: Path) -> None:
        rank = start.first_rank + local_rank
        self._folder = folder / f"{start.generation}-{rank}"
        self._status = RankStatus(rank)
        self._beat_ns = 0
        self._child: Child | None = None
        try:
            self._folder.mkdir(parents=True)  # of a temporary folder that may have been cleared
            self._child = Child(command, _environment(start, local_rank, self._folder))
        except (OSError, SubprocessError) as e:
            self._end(_NOT_STARTED, f"cannot start {command[0]}: {e}")

    def look(self) -> RankStatus:
        if self._status.exit is None and self._child is not None:
            code = self._child.wait(0)
            self._read_heartbeat()  # after the exit code: the last beat counts
            if self._status.stop_reason is None and (reason := self.read("stop_reason.txt")):
                self._update(stop_reason=reason.strip())
            if code is not None:
                self._child.kill()  # helpers that it left behind would keep its GPU
                self._end(code, self.read("error.txt"))
        return self._status

    def signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._child.send(number)

    def ask_for_stack(self) -> None:
        # One that never beats is not ours: SIGUSR2 would end it.
        if self._status.phase is not None:
            self.signal(signal.SIGUSR2)

    def stack_bytes(self) -> int:
        try:
            return (self._folder / "stack.txt").stat().st_size
        except FileNotFoundError:
            return 0

    def read(self, name: str) -> str | None:
        """The end of a file in the rank's folder, if there is such a file."""
        try:
            return (self._folder / name).read_text(errors="replace")[-MAX_TEXT_CHARS:]
        except FileNotFoundError:
            return None

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read_heartbeat(self) -> None:
        path = self._folder / "heartbeat"
        try:
            beat_ns = path.stat().st_mtime_ns
            if beat_ns == self._beat_ns:
                return
            phase, step = path.read_text().split()
            self._update(phase=phase, step=int(step), beat_at=time.monotonic())
            self._beat_ns = beat_ns
        except (FileNotFoundError, ValueError):
            pass  # none yet, or it is being written: the next look sees it

    def _end(self, code: int, error: str | None) -> None:
        now = time.monotonic()
        try:
            # Its own time tells which of several errors was the first.
            age_s = time.time() - (self._folder / "error.txt").stat().st_mtime
        except FileNotFoundError:
            age_s = 0.0
        self._update(exit=code, error=error, ended_at=now - age_s)

    def _update(self, **fields: Any) -> None:
        self._status = replace(self._status, **fields)


def _environment(start: Start, local_rank: int, folder: Path) -> Mapping[str, str]:
    given = dict(os.environ)
    if USERS_PATH in given:
        given["PYTHONPATH"] = given.pop(USERS_PATH)
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // start.nproc)),
        **given,
        "RANK": str(start.first_rank + local_rank),
        "WORLD_SIZE": str(start.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(start.nproc),
        "GROUP_RANK": str(start.group_rank),
        "MASTER_ADDR": start.master_addr,
        "MASTER_PORT": str(start.master_port),
        "SPOTFORGE_RANK_DIR": str(folder),
    }
