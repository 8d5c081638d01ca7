"""Processes that stay, so that the seconds of imports are spent once and not for every cell.

What a call prints goes to a log file; how it ended comes back as an `Outcome`. A process that dies,
or does not answer in time, is the end of one call: the next one starts others.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from core.errors import ExitCode, SpotforgeError
from tests.ports import free_port

_GRACE_S = 5.0  # for the other ranks, once one of them has failed


class Wrong(Exception):
    """What the product made is not what it should be."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        state: `ok`, `refused` (in one line, with exit code 2) or `wrong`.
        said: The line of a refusal, or what is wrong; or what the call returned.
        is_lost: The processes are not to be used again.
    """

    state: str
    said: Any = None
    is_lost: bool = False


class Workers:
    """One process, or the ranks of a world, that call what they are told to.

    Args:
        name: Of the log file.
        folder: For the log file.
        num_ranks: Of the world; each process is one rank of it.
    """

    def __init__(self, name: str, folder: Path, num_ranks: int = 1) -> None:
        self._log, self._num_ranks = folder / f"{name}.log", num_ranks
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []

    def call(self, function: str, *args: Any, timeout_s: float) -> Outcome:
        """Calls a function in every process.

        Args:
            function: Its module below `tests.families` and its name, as `training.train`: only the
                workers import it.
            args: Its arguments.
            timeout_s: After which the processes are given up.

        Returns:
            How it ended on rank 0, or where it ended worst.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        outcome = self._gather(time.monotonic() + timeout_s, timeout_s)
        if outcome.is_lost:
            self.close()
        return outcome

    def close(self) -> None:
        """Ends the processes, and all that they started."""
        for connection in self._connections:
            connection.close()  # which ends those that wait for a call
        for process in self._processes:
            process.join(_GRACE_S)
            if process.pid is not None and process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        for rank in range(self._num_ranks):
            ours, theirs = context.Pipe()
            described = (rank, self._num_ranks, port) if self._num_ranks > 1 else None
            process = context.Process(target=_work, args=(theirs, self._log, described))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _gather(self, deadline_s: float, timeout_s: float) -> Outcome:
        outcomes: dict[int, Outcome] = {}
        waiting = dict(enumerate(self._connections))
        while waiting:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                late = Outcome("wrong", f"no end after {timeout_s:.0f} s", is_lost=True)
                return _worst([*outcomes.values(), late])
            for connection in wait([*waiting.values()], left_s):
                [rank] = [r for r, c in waiting.items() if c is connection]
                del waiting[rank]
                try:
                    outcomes[rank] = connection.recv()
                except (EOFError, ConnectionError):
                    code = self._process_code(rank)
                    outcomes[rank] = Outcome("wrong", f"the process ended with {code}", True)
                if outcomes[rank].is_lost:
                    deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
        return _worst([outcomes[rank] for rank in sorted(outcomes)])

    def _process_code(self, rank: int) -> int | None:
        self._processes[rank].join(_GRACE_S)
        return self._processes[rank].exitcode


def _worst(outcomes: list[Outcome]) -> Outcome:
    """What all ranks together come to: a crash says more than the ranks that then wait for it."""
    order = ("wrong", "refused", "ok")
    first = min(outcomes, key=lambda outcome: order.index(outcome.state))
    # Ranks of which some refuse and others do not are apart.
    is_lost = any(o.is_lost for o in outcomes) or len({o.state for o in outcomes}) > 1
    return Outcome(first.state, first.said, is_lost)


def _work(connection: Connection, log: Path, described: tuple[int, int, int] | None) -> None:
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # On a CPU, where two orders of sums differ by little, and without asking the hub.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if described is not None:
        rank, num_ranks, port = described
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        print(f"--- {function}{args}", flush=True)
        outcome = _outcome(function, args)
        print(f"--- {outcome}", flush=True)
        connection.send(outcome)


def _outcome(function: str, args: tuple[Any, ...]) -> Outcome:
    module, _, name = function.rpartition(".")
    try:
        return Outcome("ok", getattr(import_module(f"tests.families.{module}"), name)(*args))
    except Wrong as e:
        return Outcome("wrong", str(e))
    except SpotforgeError as e:
        is_refusal = e.exit_code is ExitCode.BAD_CONFIG or " is not served" in str(e)
        return Outcome("refused" if is_refusal else "wrong", str(e))
    except BaseException as e:  # whatever it is, it is one cell's
        traceback.print_exc()
        sys.stderr.flush()
        lines = str(e).strip().splitlines() or [""]
        return Outcome("wrong", f"{type(e).__name__}: {lines[0]}", is_lost=True)
