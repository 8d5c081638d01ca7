"""Ranks that start in a moment: forked from a process that has imported everything already."""

import ctypes
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

from tests.chaos.probe import Probe
from tests.ports import free_port

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["trainer.run", "parallel.ddp", "parallel.fsdp", "transformers.models.llama.modeling_llama"]
)
_POLL_S = 0.003
_ECHO_S = 0.3  # what a supervisor leaves to the peers of a lost rank before it ends them
_GRACE_S = 2.0
_PR_SET_PDEATHSIG = 1


class Gang:
    """One start of a run, with all its ranks on this machine.

    Args:
        configs: Of each rank; they differ in what their machines announce only.
        folder: A new one, in which each rank gets a folder.
        moment: Where each rank pauses, if anywhere.
        machines: Each rank is a machine of its own, instead of all on one.
    """

    def __init__(self, configs, folder, moment=None, machines=False):
        self.began = time.time()
        self.world_size = len(configs)
        port = free_port()
        self.folders = [folder / f"rank-{rank}" for rank in range(self.world_size)]
        self._processes = []
        for rank, config in enumerate(configs):
            self.folders[rank].mkdir(parents=True)
            environment = {
                "RANK": rank,
                "WORLD_SIZE": self.world_size,
                "LOCAL_RANK": 0 if machines else rank,
                "LOCAL_WORLD_SIZE": 1 if machines else self.world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "SPOTFORGE_RANK_DIR": self.folders[rank],
            }
            process = _FORKS.Process(
                target=_rank, args=(config, environment, self.folders[rank], moment)
            )
            process.start()
            self._processes.append(process)

    @property
    def codes(self):
        """Exit code of each rank; None while it runs."""
        return [process.exitcode for process in self._processes]

    def has_reached(self, point):
        """Whether any rank has come to `point`."""
        return any(f"\n{point} " in self._marks(rank) for rank in range(self.world_size))

    def wait_for(self, moment, timeout_s=60.0):
        """Waits until a rank reaches `moment`; False if a rank ended before, or none does."""
        mark = f"{moment.point} {moment.nth}\n"
        deadline = time.monotonic() + timeout_s
        while not any(self._has(rank, mark, moment.after) for rank in range(self.world_size)):
            if any(code is not None for code in self.codes) or time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        time.sleep(moment.delay_s)
        return True

    def signal(self, rank, number):
        """Sends a signal to one rank; none if it has ended."""
        process = self._processes[rank]
        if process.is_alive():
            os.kill(process.pid, number)

    def limit_files(self, size_bytes):
        """Lets no rank write a file beyond a size from now on."""
        for process in self._processes:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size_bytes, size_bytes))

    def wait(self, timeout_s):
        """Waits until all have ended; False, and their stacks in `log`, if they do not."""
        if self._wait(timeout_s):
            return True
        for rank in range(self.world_size):
            self.signal(rank, signal.SIGUSR2)
        self._wait(1.0)
        self.kill()
        return False

    def mourn(self):
        """After the loss of a rank: ends the others as a supervisor does."""
        self._wait(_ECHO_S)
        for rank in range(self.world_size):
            self.signal(rank, signal.SIGTERM)
        self._wait(_GRACE_S)
        self.kill()

    def kill(self):
        """Kills all that still run."""
        for process in self._processes:
            process.kill()
        self._wait(30.0)

    def log(self, rank=0):
        """What a rank has printed."""
        path = self.folders[rank] / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def stacks(self):
        """What the ranks told when they were asked where they hang."""
        return "\n".join(
            f"rank {rank}: {path.read_text()}"
            for rank, folder in enumerate(self.folders)
            if (path := folder / "stack.txt").exists()
        )

    def _wait(self, timeout_s):
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return all(code is not None for code in self.codes)

    def _has(self, rank, mark, after):
        marks = self._marks(rank)
        return f"\n{mark}" in marks and (after is None or f"\n{after} " in marks)

    def _marks(self, rank):
        path = self.folders[rank] / "marks"
        return "\n" + path.read_text() if path.exists() else ""


def _rank(config, environment, folder, moment):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # none outlives the suite
    log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {name: str(value) for name, value in environment.items()}
    import torch

    from trainer.launching import run_rank

    torch.set_num_threads(1)
    probe = Probe(Path(folder), moment)
    probe.install()
    probe.mark("begin")
    raise SystemExit(run_rank(config))
