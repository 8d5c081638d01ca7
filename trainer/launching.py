"""Starts the ranks of a run on this machine, or joins those that a launcher started.

python -m trainer nproc=2           two ranks here, through torch's elastic launcher
torchrun ... -m trainer ...         the ranks are there: RANK, WORLD_SIZE, ...
SkyPilot, one call a node           the nodes are there: SKYPILOT_NODE_IPS, ...; ranks start here
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
import uuid
from pathlib import Path
from typing import Any

from monitoring.errors import ConfigError, ExitCode, SpotforgeError
from trainer.config import TrainerConfig

_RENDEZVOUS_PORT = 29400


def launch(config: TrainerConfig, isolated: bool = False) -> int:
    """Runs `config` on all of its ranks.

    Args:
        config: The run.
        isolated: Give even a single rank a process of its own, for a caller that has more runs to
            come: DeepSpeed keeps the process groups of the first one for ever.

    Returns:
        The exit code: 0 finished, 33 stopped with a complete checkpoint, 2 refused, 1 failed.
    """
    try:
        if "RANK" in os.environ:
            _check_launcher(config)
            return run_rank(config)
        nproc, num_nodes = _local_ranks(config), int(os.environ.get("SKYPILOT_NUM_NODES", 1))
        config.check(nproc * num_nodes)
        if nproc * num_nodes == 1 and not isolated:
            return run_rank(config)
        return _launch_ranks(config, nproc, num_nodes)
    except SpotforgeError as e:
        print(e, file=sys.stderr)
        return e.exit_code


def run_rank(config: TrainerConfig) -> int:
    """Runs this process's rank; prints what went wrong, once for all ranks that can tell."""
    from trainer.run import train
    from trainer.stopping import StopSignal

    with StopSignal() as stop:
        try:
            return train(config, stop)
        except SpotforgeError as e:
            if not e.seen_by_all or int(os.environ.get("RANK", 0)) == 0:
                print(e, file=sys.stderr, flush=True)
            return e.exit_code
        except Exception:
            # A rank that loses another fails too: its launcher's SIGTERM says that it is the echo.
            if not ("RANK" in os.environ and stop.wait(seconds=3)):
                traceback.print_exc()
            return ExitCode.FAILED


def _run_spawned_rank(config: TrainerConfig, outcome: str) -> int:
    """What the elastic launcher calls in each process."""
    code = run_rank(config)
    if int(os.environ["LOCAL_RANK"]) == 0:
        Path(outcome).write_text(str(int(code)))
    if code != ExitCode.FINISHED:
        sys.exit(code)  # returning would wait for a launcher that is itself waiting to stop
    return code


def _launch_ranks(config: TrainerConfig, nproc: int, num_nodes: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # What a rank has to say it says itself; the launcher would add pages about exit codes.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=nproc,
        max_restarts=0,
        shutdown_timeout=config.shutdown_timeout_s,
        **_rendezvous(num_nodes),
    )
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder) / "outcome"
        try:
            elastic_launch(settings, _run_spawned_rank)(config, str(outcome))
        except SignalException as e:
            # The ranks were told to stop and have done so: rank 0 left word how.
            if outcome.exists():
                return int(outcome.read_text())
            print(f"killed by {e.sigval.name} before a checkpoint was complete", file=sys.stderr)
            return ExitCode.FAILED
        except ChildFailedError as e:
            _, failure = e.get_first_failure()
            if failure.exitcode < 0:
                print(f"rank {failure.local_rank} died: {failure.signal_name()}", file=sys.stderr)
                return ExitCode.FAILED
            return failure.exitcode
    return ExitCode.FINISHED


def _rendezvous(num_nodes: int) -> dict[str, Any]:
    if num_nodes == 1:
        # Port 0: several runs on one machine do not meet.
        return {
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
        }
    head = os.environ["SKYPILOT_NODE_IPS"].split("\n")[0]
    is_host = int(os.environ["SKYPILOT_NODE_RANK"]) == 0
    return {
        "run_id": os.environ.get("SKYPILOT_TASK_ID", "spotforge"),
        "rdzv_backend": "c10d",
        "rdzv_endpoint": f"{head}:{_RENDEZVOUS_PORT}",
        "rdzv_configs": {"is_host": is_host},
    }


def _local_ranks(config: TrainerConfig) -> int:
    import torch

    num_gpus = torch.cuda.device_count()
    if config.nproc == "auto":
        return int(os.environ.get("SKYPILOT_NUM_GPUS_PER_NODE", 0)) or num_gpus or 1
    nproc = _parse_nproc(config.nproc)
    if num_gpus and nproc > num_gpus:
        raise ConfigError(
            "nproc", nproc, f"this machine has {num_gpus} GPUs", f"use nproc={num_gpus} or auto"
        )
    return nproc


def _check_launcher(config: TrainerConfig) -> None:
    """An `nproc` that contradicts the launcher is refused rather than ignored."""
    started = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if config.nproc != "auto" and _parse_nproc(config.nproc) != started:
        raise ConfigError(
            "nproc",
            config.nproc,
            f"the launcher started {started} ranks on this machine",
            "leave nproc=auto under a launcher",
        )


def _parse_nproc(nproc: str) -> int:
    if nproc.isdecimal() and int(nproc) > 0:
        return int(nproc)
    raise ConfigError("nproc", nproc, "must be auto or a number above 0", "use nproc=auto")
