"""Runs a function on several gloo ranks of this machine, as a launcher would.

Ranks are forked from one process that has imported torch and the trainer: importing them takes a
fresh process 8 CPU-seconds, which is most of what a rank of a test would cost.
"""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

_FORKS = mp.get_context("forkserver")
_FORKS.set_forkserver_preload(["trainer.run"])


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls `function(*args)` on every rank.

    Returns:
        What each rank returned. An exception on any rank fails the caller with its traceback.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = _FORKS.SimpleQueue()
    processes = [
        _FORKS.Process(
            target=_rank,
            args=(rank, world_size, port, dict(os.environ), queue, function, args),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result, error = queue.get()
            if error is not None:
                raise AssertionError(f"rank {rank} of {world_size}:\n{error}")
            results[rank] = result
    finally:
        for process in processes:
            if len(results) < world_size:
                process.kill()
            process.join()
    return [results[rank] for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    queue: Any,
    function: Callable[..., Any],
    args: Any,
) -> None:
    # The test's environment: that of the process this one is forked from is older.
    os.environ.clear()
    os.environ |= environment
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        queue.put((rank, function(*args), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
