"""Runs a function on several gloo ranks of this machine, as a launcher would."""

import pickle
import socket
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Pipe, wait
from typing import Any

from core.process.python import environment, python


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, apart: bool = False
) -> list[Any]:
    """Calls `function(*args)` on every rank.

    Args:
        function: Function of a module, since it is pickled.
        world_size: Number of ranks.
        args: Arguments of the function.
        apart: True tells each rank that it is alone on its machine.

    Returns:
        What each rank returned. An exception on any rank fails the caller with its traceback.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    call = pickle.dumps((function, args))
    processes: list[subprocess.Popen[bytes]] = []
    unheard: dict[Any, int] = {}
    results: dict[int, Any] = {}
    try:
        for rank in range(world_size):
            told, tells = Pipe(duplex=False)
            with tells:
                processes.append(_start(rank, world_size, apart, port, tells.fileno()))
            unheard[told] = rank
            stdin = processes[rank].stdin
            assert stdin is not None
            with stdin:
                stdin.write(call)
        while unheard:
            for told in wait(list(unheard)):
                rank = unheard.pop(told)
                try:
                    result, error = told.recv()
                except EOFError:
                    result, error = None, f"ended with exit code {processes[rank].wait()}"
                finally:
                    told.close()
                if error is not None:
                    raise AssertionError(f"rank {rank} of {world_size}:\n{error}")
                results[rank] = result
    finally:
        for told in unheard:
            told.close()
        for process in processes:
            if len(results) < world_size:
                process.kill()
            process.wait()
    return [results[rank] for rank in range(world_size)]


def _start(
    rank: int, world_size: int, apart: bool, port: int, tells: int
) -> subprocess.Popen[bytes]:
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": "0" if apart else str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": "1" if apart else str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        python("-m", "tests.rank", str(tells)),
        env=environment(**place),
        stdin=subprocess.PIPE,
        pass_fds=[tells],
    )
