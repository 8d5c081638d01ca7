"""Starts the ranks of a run on this machine, or joins those that a launcher started.

python -m trainer nproc=2           this process becomes `python -m launch supervise`, which starts
                                    two ranks, and again when one is lost
torchrun ... -m trainer ...         the ranks are there: RANK, WORLD_SIZE, ...
SkyPilot, one call a node           the nodes are there: SKYPILOT_NODE_IPS, ...; the first becomes
                                    the supervisor and the others join it
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Collection
from pathlib import Path

from core.errors import ConfigError, ExitCode, SpotforgeError
from core.folder import digest_of, write_file
from core.process.child import Child, exit_code
from core.process.gpus import NoAnswer, visible_gpus
from core.process.python import environment, python
from core.process.signals import passed_on
from core.settings.stored import to_yaml
from parallel.config import FsdpConfig
from parallel.launcher import Place, read_place
from trainer.command import TRAINER
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
    os.execve(command[0], command, environment())


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
    rank = python("-m", "trainer.rank", str(_freeze(config, given)))
    return python("-m", "launch", *action, "--", *rank)


def _freeze(config: TrainerConfig, given: Collection[str]) -> Path:
    """The configuration, and which keys of it were given, in a file that is named by its content.

    Ranks that start again days later are given what was asked for, not what YAML files say by then.
    """
    name = digest_of([resolve(config), sorted(given)])[:16]
    folder = Path(config.data.cache_dir).expanduser().absolute() / "launched"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.yaml"
        write_file(path, to_yaml(TRAINER, config, given))
        return path
    except OSError as e:
        raise ConfigError(
            "data.cache_dir", config.data.cache_dir, f"cannot be written: {e.strerror}", "change it"
        ) from e


def _run(command: list[str]) -> int:
    """Runs a program that is told what this one is told; returns its exit code."""
    with Child(command, environment()) as child, passed_on(child):
        code = child.wait()
    assert code is not None
    return exit_code(code)


def _local_ranks(config: TrainerConfig) -> int:
    try:
        num_gpus = len(visible_gpus())
    except NoAnswer as e:
        raise SpotforgeError(f"the GPUs of this machine: {e}") from None
    if config.nproc == "auto":
        return int(os.environ.get("SKYPILOT_NUM_GPUS_PER_NODE", 0)) or num_gpus or 1
    nproc = _parse_nproc(config.nproc)
    if num_gpus and nproc > num_gpus:
        fix = f"use nproc={num_gpus} or auto; CUDA_VISIBLE_DEVICES= hides them"
        raise ConfigError("nproc", nproc, f"this machine has {num_gpus} GPUs", fix)
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
