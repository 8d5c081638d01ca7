"""A cloud on this machine: nodes that are process groups, and are taken away and come back.

For trying out what a job does when its machines go, before money is spent on some that will. Each
node is a `python -m launch join` of its own, so the supervisor sees what it would see on a network.
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

_CLOSE_S = 10.0  # for nodes that were dismissed to end


@dataclass(frozen=True)
class Interruptions:
    """How nodes are taken away.

    Attributes:
        mean_s: Mean seconds for which a node is left alone (exponential); None: always.
        notice_s: Seconds from SIGTERM to SIGKILL; 0: there is no notice.
        away_s: Seconds until a node that is gone is replaced.
        seed: Of the times.
    """

    mean_s: float | None
    notice_s: float
    away_s: float
    seed: int


class LocalCloud:
    """Runs nodes for a supervisor at a port of this machine.

    Args:
        command: The supervisor's.
        num_nodes: That are up, but for those that are being replaced.
        nproc: Ranks of each.
        port: Where the supervisor listens.
        interruptions: See there.
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
        """Keeps the nodes up, and takes them away, until it is cancelled.

        Raises:
            ConfigError: There are GPUs, and fewer than the ranks.
        """
        environments = await self._environments()
        await asyncio.gather(*(self._keep_up(i, env) for i, env in enumerate(environments)))

    async def close(self) -> None:
        """Waits for nodes that end by themselves, and kills the others."""
        ends = [process.wait() for process in self._up.values()]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*ends), _CLOSE_S)
        for process in self._up.values():
            await _kill(process)

    async def _environments(self) -> list[dict[str, str]]:
        """Returns one for each node, with GPUs of its own."""
        try:
            gpus = await visible_gpus_async()
        except NoAnswer as e:
            raise SpotforgeError(f"the GPUs of this machine: {e}") from None
        num_ranks = self._num_nodes * self._nproc
        if 0 < len(gpus) < num_ranks:
            rule = f"{self._num_nodes} nodes need {num_ranks} GPUs, and there are {len(gpus)}"
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
        """Leaves it alone for a while, takes it away, and says how it ended."""
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
    kill_group(process.pid)  # its ranks die with it
    await process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
