"""The ranks that one machine runs in one generation: their processes and the files they write.

Each rank has its own folder, SPOTFORGE_RANK_DIR, in which it may write

    heartbeat        phase and step (`train 12`), rewritten at every poll point; the file's time is
                     the time of the beat
    stack.txt        the stacks of all its threads, on SIGUSR2
    stop_reason.txt  one line: why this rank itself was told to stop
    error.txt        a traceback, before the rank exits with 1
"""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

from core import layout
from core.clock import variable_of
from core.process.child import Child
from core.process.python import USERS_PATH
from launch.elastic.protocol import MAX_TEXT_CHARS, RankStatus, Start
from parallel.launcher import RANK_DIR_VARIABLE, TOKEN_VARIABLE
from parallel.network import address_to, interface_variables

_STACKS_S = 3.0
_STACKS_SETTLED_S = 0.3  # a stack file that has not grown for so long is complete
_NOW = "now"  # file whose time is that of the folder's file system
_NOT_STARTED = 127  # a shell's exit code for a command that it cannot start


class Gang:
    """Starts, watches and signals the ranks of this machine.

    Args:
        command: Command that each rank runs.
        start: Rank numbers, world size and rendezvous address.
        folder: Folder in which the folders of the ranks are created.
    """

    def __init__(self, command: Sequence[str], start: Start, folder: Path) -> None:
        self.generation = start.generation
        self._ranks = [_Rank(command, start, local, folder) for local in range(start.nproc)]

    def status(self) -> list[RankStatus]:
        """Returns the current status of each rank; times are of `time.monotonic()`."""
        return [rank.look() for rank in self._ranks]

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to every running rank; SIGKILL reaches also the processes they started."""
        for rank in self._ranks:
            rank.signal(number)

    async def stacks(self) -> list[str]:
        """Returns the stacks of all threads of each rank; empty for a rank that does not answer."""
        for rank in self._ranks:
            rank.ask_for_stack()
        started = changed = time.monotonic()
        sizes = [0] * len(self._ranks)
        # A rank writes its stacks piece by piece and does not say when it is done: wait until no
        # file has grown for a moment.
        while (now := time.monotonic()) < started + _STACKS_S:
            await asyncio.sleep(0.05)
            before, sizes = sizes, [rank.stack_bytes() for rank in self._ranks]
            if sizes != before:
                changed = now
            elif all(sizes) and now > changed + _STACKS_SETTLED_S:
                break
        return [rank.read(layout.STACK) or "" for rank in self._ranks]

    def close(self) -> None:
        """Kills the ranks that still run, and removes their folders."""
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
            self._folder.mkdir(parents=True)  # a cleaner of /tmp may have removed the parent
            self._child = Child(command, _environment(start, local_rank, self._folder))
        except (OSError, SubprocessError) as e:
            self._end(_NOT_STARTED, f"cannot start {command[0]}: {e}")

    def look(self) -> RankStatus:
        if self._status.exit is None and self._child is not None:
            # The exit code is read first: a rank that has ended beats no more, so the heartbeat
            # that is read after it is the last one.
            code = self._child.wait(0)
            self._read_heartbeat()
            if self._status.stop_reason is None and (reason := self.read(layout.STOP_REASON)):
                self._update(stop_reason=reason.strip())
            if code is not None:
                self._child.kill()  # helper processes left behind would hold the GPU's memory
                self._end(code, self.read(layout.ERROR))
        return self._status

    def signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._child.send(number)

    def ask_for_stack(self) -> None:
        # A rank without heartbeat is not our trainer: it has no handler, so SIGUSR2 would end it.
        if self._status.phase is not None:
            self.signal(signal.SIGUSR2)

    def stack_bytes(self) -> int:
        try:
            return (self._folder / layout.STACK).stat().st_size
        except FileNotFoundError:
            return 0

    def read(self, name: str) -> str | None:
        """Returns the end of a file in the rank's folder; None if it does not exist."""
        try:
            return (self._folder / name).read_text(errors="replace")[-MAX_TEXT_CHARS:]
        except FileNotFoundError:
            return None

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read_heartbeat(self) -> None:
        path = self._folder / layout.HEARTBEAT
        try:
            beat_ns = path.stat().st_mtime_ns
            if beat_ns == self._beat_ns:
                return
            phase, step = path.read_text().split()
            self._update(phase=phase, step=int(step), beat_at=time.monotonic())
            self._beat_ns = beat_ns
        except (FileNotFoundError, ValueError):
            pass  # not yet written, or being written: the next look reads it

    def _end(self, code: int, error: str | None) -> None:
        now, age_s = time.monotonic(), 0.0
        # When the error was written, not when it is seen, tells which of several came first. Both
        # times are of the folder's file system: on a file server it has another clock than ours.
        with suppress(OSError):
            written_s = (self._folder / layout.ERROR).stat().st_mtime
            (self._folder / _NOW).touch()
            age_s = (self._folder / _NOW).stat().st_mtime - written_s
        self._update(exit=code, error=error, ended_at=now - age_s)

    def _update(self, **fields: Any) -> None:
        self._status = replace(self._status, **fields)


def _environment(start: Start, local_rank: int, folder: Path) -> Mapping[str, str]:
    given = dict(os.environ)
    # Our own programs run with our own PYTHONPATH; the ranks' program gets the user's back.
    if USERS_PATH in given:
        given["PYTHONPATH"] = given.pop(USERS_PATH)
    given.pop(TOKEN_VARIABLE, None)  # ranks join nothing
    if start.world_size > start.nproc:
        # COMMAND may be a program that does not choose by itself, as ours does.
        given |= interface_variables(address_to(start.master_addr), given)
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
        RANK_DIR_VARIABLE: str(folder),
        **variable_of(start.time),
    }
