"""Starts the ranks of a run on this machine, or joins those that a launcher started.

python -m trainer nproc=2           this process becomes `python -m launch supervise`, which starts
                                    two ranks, and restarts them if one is lost
torchrun ... -m trainer ...         the launcher started the ranks: RANK, WORLD_SIZE, ...
SkyPilot, one call per node         the nodes exist: SKYPILOT_NODE_IPS, ...; the first becomes
                                    the supervisor and the others join it
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Collection
from pathlib import Path

from core import layout
from core.errors import ConfigError, ExitCode, OwnDiskError, SpotforgeError, is_full
from core.folder import digest_of, write_file
from core.process.child import Child, exit_code
from core.process.gpus import NoAnswer, visible_gpus
from core.process.python import environment, python
from core.process.signals import passed_on
from core.settings.stored import to_yaml
from parallel.config import FsdpConfig
from parallel.launcher import (
    RANK_DIR_VARIABLE,
    SUPERVISOR_PORT,
    TOKEN_VARIABLE,
    Place,
    read_place,
)
from trainer.command import TRAINER
from trainer.config import TrainerConfig, resolve
from trainer.heartbeat import Heartbeat
from trainer.stopping import StopSignal


def launch(config: TrainerConfig, isolated: bool = False, given: Collection[str] = ()) -> int:
    """Runs `config` on all ranks of this machine.

    Args:
        config: Settings of the run.
        isolated: True returns in any case, and runs even a single rank in a process of its own. A
            caller with more runs to come needs that, since DeepSpeed never releases the process
            groups of the first one. False lets the supervisor of several ranks replace this
            process.
        given: Keys that the user set; the others have their defaults.

    Returns:
        Exit code: 0 finished, 33 stopped with all steps saved, 2 refused, 1 failed.
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
    # exec discards buffered output. It keeps the process id, so that signals reach the supervisor
    # directly.
    sys.stdout.flush()
    os.execve(command[0], command, environment())


def run_rank(config: TrainerConfig, given: Collection[str] = ()) -> int:
    """Runs this process's rank; prints an error once for all ranks that report the same."""
    with StopSignal() as stop:
        heartbeat = Heartbeat()
        place: Place | None = None
        try:
            place = read_place()
            from trainer.run import train  # imports for seconds, so signals are handled before

            return train(config, stop, heartbeat, given)
        except SpotforgeError as e:
            if (
                isinstance(e, OwnDiskError)
                and place is not None
                and os.environ.get(RANK_DIR_VARIABLE)
            ):
                return _leave(e, stop, place)
            if e.exit_code == ExitCode.FAILED:
                heartbeat.failed()
            if not e.seen_by_all or place is None or place.rank == 0:
                print(e, file=sys.stderr, flush=True)
            return e.exit_code
        except Exception as e:
            if isinstance(e, OSError) and is_full(e):
                rule = f"the disk is full ({e})"
                fix = "free some space, then run the same command again"
                full = ConfigError("run.dir", config.run.dir, rule, fix)
                print(full, file=sys.stderr, flush=True)
                return ExitCode.BAD_CONFIG
            heartbeat.failed()
            # A rank that loses another one fails as well. If its launcher sends SIGTERM within 3 s,
            # the failure is a consequence, and its traceback would hide the cause.
            if not (place is not None and stop.wait(seconds=3)):
                traceback.print_exc()
            return ExitCode.FAILED


def _leave(error: OwnDiskError, stop: StopSignal, place: Place) -> int:
    """Has the supervisor go on without the machine whose disk cannot be written."""
    if place.rank == error.rank:
        stop.give_up(error.rule)
        print(error, file=sys.stderr, flush=True)
    return ExitCode.START_AGAIN


def _supervisor(config: TrainerConfig, given: Collection[str], num_nodes: int) -> list[str]:
    """Returns the command that starts the ranks of this machine and restarts lost ones."""
    # nproc=auto is passed on: GPUs are counted before each start, since one may be lost by then.
    options = ["--nproc", config.nproc, "--grace", str(config.shutdown_timeout_s)]
    if num_nodes > 1 and not os.environ.get(TOKEN_VARIABLE):
        rule = f"is not set, and the {num_nodes} nodes of this job join by it"
        fix = f"give all of them the same one: sky launch --secret {TOKEN_VARIABLE}=..."
        raise ConfigError(TOKEN_VARIABLE, "", rule, fix)
    if int(os.environ.get("SKYPILOT_NODE_RANK", 0)) > 0:
        head = os.environ["SKYPILOT_NODE_IPS"].split("\n")[0]
        action = ["join", f"{head}:{SUPERVISOR_PORT}", *options]
    else:
        options += ["--hang-timeout", str(config.hang_timeout_s)]
        options += ["--events", str(config.run_dir / layout.SUPERVISOR_EVENTS)]
        if isinstance(config.parallel, FsdpConfig):
            # With replicas, FSDP can use only certain numbers of ranks.
            options += ["--multiple-of", str(config.parallel.ranks_multiple_of)]
        if num_nodes > 1:
            options += ["--listen", str(SUPERVISOR_PORT), "--nodes", str(num_nodes)]
        action = ["supervise", *options]
    rank = python("-m", "trainer.rank", str(_freeze(config, given)))
    return python("-m", "launch", *action, "--", *rank)


def _freeze(config: TrainerConfig, given: Collection[str]) -> Path:
    """Writes the configuration and the given keys to a file named by their content; returns it.

    Ranks that are restarted days later get the settings of the first start, even if YAML files have
    changed since.
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
    """Runs a program to which signals are forwarded; returns its exit code."""
    with passed_on(lambda: Child(command, environment())) as (child, _):
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
    """Raises ConfigError for an `nproc` that contradicts the launcher."""
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
