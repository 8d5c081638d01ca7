"""A simulated cloud on this machine, whose nodes are process groups that come and go.

It shows what a job does when its machines are preempted, before any are rented. Each node is a
separate `python -m launch join`, so that the supervisor sees the same as on a network.
"""

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import ConfigError, SpotforgeError
from core.process.child import describe_exit, kill_group, spawn
from core.process.gpus import NoAnswer, visible_gpus_async
from core.process.python import USERS_PATH, environment, python
from launch.elastic.journal import say

_CLOSE_S = 10.0  # time in which dismissed nodes end by themselves


@dataclass(frozen=True)
class Interruptions:
    """How nodes are preempted.

    Attributes:
        mean_s: Mean lifetime of a node in seconds (exponential); None: nodes are not preempted.
        notice_s: Seconds from SIGTERM to SIGKILL; 0: SIGKILL without notice.
        away_s: Seconds until a lost node is replaced.
        seed: Seed of the random lifetimes.
    """

    mean_s: float | None
    notice_s: float
    away_s: float
    seed: int


class LocalCloud:
    """Runs nodes for a supervisor on this machine.

    Args:
        command: Command of the supervisor, which each rank runs.
        num_nodes: Number of nodes, including those that are being replaced.
        nproc: Ranks of each node.
        port: Port at which the supervisor listens.
        interruptions: How nodes are preempted.
    """

    def __init__(
        self,
        command: Sequence[str],
        num_nodes: int,
        nproc: int,
        port: int,
        interruptions: Interruptions,
    ) -> None:
        join = python("-m", "launch", "join", f"127.0.0.1:{port}")
        self._join = [*join, "--nproc", str(nproc), "--", *command]
        self._num_nodes, self._nproc = num_nodes, nproc
        self._interruptions = interruptions
        self._up: dict[int, asyncio.subprocess.Process] = {}

    async def run(self) -> None:
        """Starts, preempts and replaces nodes until it is cancelled.

        Raises:
            ConfigError: The machine has GPUs, but fewer than ranks.
            SpotforgeError: The GPU driver does not answer.
        """
        environments = await self._environments()
        await asyncio.gather(*(self._keep_up(i, env) for i, env in enumerate(environments)))

    async def close(self) -> None:
        """Waits a moment for nodes to end by themselves, and kills the others."""
        ends = [process.wait() for process in self._up.values()]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*ends), _CLOSE_S)
        for process in self._up.values():
            await _kill(process)

    async def _environments(self) -> list[dict[str, str]]:
        """Returns the environment of each node, which shares no GPU with another."""
        try:
            gpus = await visible_gpus_async()
        except NoAnswer as e:
            raise SpotforgeError(f"the GPUs of this machine: {e}") from None
        num_ranks = self._num_nodes * self._nproc
        if 0 < len(gpus) < num_ranks:
            rule = f"{self._num_nodes} nodes need {num_ranks} GPUs, but there are {len(gpus)}"
            raise ConfigError("--nproc", self._nproc, rule, "use fewer, or CUDA_VISIBLE_DEVICES=")
        more = {USERS_PATH: os.environ.get("PYTHONPATH", "")}  # the ranks' program is the user's
        environments = []
        for i in range(self._num_nodes):
            own = ",".join(gpus[i * self._nproc : (i + 1) * self._nproc])
            environments.append(
                environment(**more, **({"CUDA_VISIBLE_DEVICES": own} if gpus else {}))
            )
        return environments

    async def _keep_up(self, index: int, env: dict[str, str]) -> None:
        # One generator for each node, so that its times do not depend on when the others end.
        rng = random.Random(f"{self._interruptions.seed}/{index}")
        while True:
            process = await spawn(self._join, env=env)
            self._up[index] = process
            say("cloud", f"node {index} is up: process group {process.pid}")
            away_s = self._interruptions.away_s
            how = await self._until_it_is_gone(index, process, rng)
            say("cloud", f"node {index} is gone: {how}; another comes in {away_s:g} s")
            del self._up[index]
            await asyncio.sleep(away_s)

    async def _until_it_is_gone(
        self, index: int, process: asyncio.subprocess.Process, rng: random.Random
    ) -> str:
        """Waits until a node ends or its lifetime is over, preempts it, and says how it ended."""
        mean_s, notice_s = self._interruptions.mean_s, self._interruptions.notice_s
        left_alone_s = None if mean_s is None else rng.expovariate(1 / mean_s)
        with contextlib.suppress(TimeoutError):
            return describe_exit(await asyncio.wait_for(process.wait(), left_alone_s))
        if notice_s > 0:
            say("cloud", f"node {index} has notice: {notice_s:g} s")
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), notice_s)
                return "it left in time"
        await _kill(process)
        return "killed"


async def _kill(process: asyncio.subprocess.Process) -> None:
    kill_group(process.pid)  # the ranks are in the group of their node
    await process.wait()


def free_port() -> int:
    """Returns a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
