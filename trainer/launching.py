"""Starts the ranks of a run on this machine, or joins those that a launcher started.

python -m trainer nproc=2           this process becomes `python -m launch supervise`, which starts
                                    two ranks, and again when one is lost
torchrun ... -m trainer ...         the ranks are there: RANK, WORLD_SIZE, ...
SkyPilot, one call a node           the nodes are there: SKYPILOT_NODE_IPS, ...; the first becomes
                                    the supervisor and the others join it
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from types import FrameType

from monitoring.errors import ConfigError, ExitCode, SpotforgeError
from parallel.config import FsdpConfig
from parallel.launcher import Place, read_place
from trainer.config import TrainerConfig, resolve
from trainer.heartbeat import Heartbeat
from trainer.stopping import StopSignal

_PORT = 29400


def launch(config: TrainerConfig, isolated: bool = False, given: Collection[str] = ()) -> int:
    """Runs `config` on all of its ranks.

    Args:
        config: The run.
        isolated: Come back in any case, and give even a single rank a process of its own: for a
            caller that has more runs to come (DeepSpeed keeps the process groups of the first one
            for ever). Otherwise several ranks take this process over.
        given: Keys that the user set; the others have their defaults.

    Returns:
        The exit code: 0 finished, 33 stopped with all steps saved, 2 refused, 1 failed.
    """
    try:
        place = read_place()
        if place is not None:
            _check_launcher(config, place)
            return run_rank(config, given)
        nproc, num_nodes = _local_ranks(config), int(os.environ.get("SKYPILOT_NUM_NODES", 1))
        config.check(nproc * num_nodes)
        if nproc * num_nodes == 1 and not isolated:
            return run_rank(config, given)
        command = _supervisor(config, given, num_nodes)
    except SpotforgeError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    if isolated:
        return _run(command)
    sys.stdout.flush()
    os.execv(command[0], command)


def run_rank(config: TrainerConfig, given: Collection[str] = ()) -> int:
    """Runs this process's rank; prints what went wrong, once for all ranks that can tell."""
    with StopSignal() as stop:
        heartbeat = Heartbeat()
        place: Place | None = None
        try:
            place = read_place()
            from trainer.run import train  # seconds of imports, in which a signal may come

            return train(config, stop, heartbeat, given)
        except SpotforgeError as e:
            if e.exit_code == ExitCode.FAILED:
                heartbeat.failed()
            if not e.seen_by_all or place is None or place.rank == 0:
                print(e, file=sys.stderr, flush=True)
            return e.exit_code
        except Exception as e:
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                rule = f"the disk is full ({e})"
                fix = "free some space, then run the same command again"
                full = ConfigError("run.dir", config.run.dir, rule, fix)
                print(full, file=sys.stderr, flush=True)
                return ExitCode.BAD_CONFIG
            heartbeat.failed()
            # A rank that loses another fails too: its launcher's SIGTERM says that it is the echo.
            if not (place is not None and stop.wait(seconds=3)):
                traceback.print_exc()
            return ExitCode.FAILED


def _supervisor(config: TrainerConfig, given: Collection[str], num_nodes: int) -> list[str]:
    """The command that starts the ranks of this machine and keeps them going."""
    # auto: GPUs are counted again before each start, since one may be gone by then
    options = ["--nproc", config.nproc, "--grace", str(config.shutdown_timeout_s)]
    if int(os.environ.get("SKYPILOT_NODE_RANK", 0)) > 0:
        head = os.environ["SKYPILOT_NODE_IPS"].split("\n")[0]
        action = ["join", f"{head}:{_PORT}", *options]
    else:
        options += ["--hang-timeout", str(config.hang_timeout_s)]
        options += ["--events", str(config.run_dir / "supervisor.jsonl")]
        if isinstance(config.parallel, FsdpConfig):
            options += ["--multiple-of", str(config.parallel.ranks_multiple_of)]
        if num_nodes > 1:
            options += ["--listen", str(_PORT), "--nodes", str(num_nodes)]
        action = ["supervise", *options]
    rank = [sys.executable, "-m", "trainer.rank", str(_freeze(config, given))]
    return [sys.executable, "-m", "launch", *action, "--", *rank]


def _freeze(config: TrainerConfig, given: Collection[str]) -> Path:
    """The configuration, and which keys of it were given, in a file that is named by its content.

    Ranks that start again days later are given what was asked for, not what YAML files say by then.
    """
    content = json.dumps([resolve(config), sorted(given)], sort_keys=True)
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = Path(config.data.cache_dir).expanduser().absolute() / "launched"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{name}.{os.getpid()}"
        part.write_bytes(pickle.dumps((config, sorted(given))))
        return part.replace(folder / f"{name}.pickle")
    except OSError as e:
        raise ConfigError(
            "data.cache_dir", config.data.cache_dir, f"cannot be written: {e.strerror}", "change it"
        ) from e


def _run(command: list[str]) -> int:
    """A program that is told what this one is told."""
    with subprocess.Popen(command) as process:

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        handlers = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGUSR1)}
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it hears it too
        try:
            return process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


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


def _check_launcher(config: TrainerConfig, place: Place) -> None:
    """An `nproc` that contradicts the launcher is refused rather than ignored."""
    if config.nproc != "auto" and _parse_nproc(config.nproc) != place.local_world_size:
        raise ConfigError(
            "nproc",
            config.nproc,
            f"the launcher started {place.local_world_size} ranks on this machine",
            "leave nproc=auto under a launcher",
        )


def _parse_nproc(nproc: str) -> int:
    if nproc.isdecimal() and int(nproc) > 0:
        return int(nproc)
    raise ConfigError("nproc", nproc, "must be auto or a number above 0", "use nproc=auto")
