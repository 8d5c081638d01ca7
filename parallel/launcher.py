"""Reads what a launcher (torchrun, `python -m launch supervise`, ...) told this process.

This is the only module that reads these variables. It imports no torch, because it is used before
the decision whether torch is needed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import ConfigError

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
SUPERVISOR_PORT = 29400  # where the supervisor of several machines listens
TOKEN_VARIABLE = "SPOTFORGE_TOKEN"  # which they share, and by which they join it
# Folder in which a rank tells its supervisor what it sees of itself (launch/elastic/gang.py).
RANK_DIR_VARIABLE = "SPOTFORGE_RANK_DIR"
# A job with one process per machine (Kubeflow's PyTorchJob) sets only the other variables.
_LOCAL = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
# Local ranks under launchers that start several processes per machine, by their own variables.
_OTHER_LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_FIX = "start the ranks with torchrun, or unset all of " + ", ".join(VARIABLES)


@dataclass(frozen=True)
class Place:
    """Describes the place of this process among those that a launcher started.

    Attributes:
        rank: Number of this process among all, from 0.
        world_size: Number of all processes.
        local_rank: Number of this process among those on this machine, from 0.
        local_world_size: Number of processes on this machine.
        master_addr: Host at which the processes meet.
        master_port: Port on that host.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def read_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Returns the place that the environment describes, or None without a launcher.

    If both LOCAL_ variables and no others are missing, this is the only process of its machine.

    Raises:
        ConfigError: Some of the variables are missing, or their values contradict each other.
    """
    given = {name: environment[name] for name in VARIABLES if name in environment}
    if not given:
        return None
    others = [name for name in _OTHER_LOCAL_RANKS if name in environment]
    if set(VARIABLES) - given.keys() == _LOCAL.keys() and not others:
        given |= _LOCAL
    for name in VARIABLES:
        if not given.get(name, "").strip():
            rule = f"must be set, since {next(iter(given))}={next(iter(given.values()))} is set"
            raise ConfigError(name, given.get(name, ""), rule, _FIX)
    numbers = {name: _number(name, given[name]) for name in VARIABLES if name != "MASTER_ADDR"}
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers[rank] >= numbers[size]:
            rule = f"must be below {size}, which is {numbers[size]}"
            raise ConfigError(rank, numbers[rank], rule, _FIX)
    if numbers["LOCAL_WORLD_SIZE"] > numbers["WORLD_SIZE"]:
        rule = f"must be at most WORLD_SIZE, which is {numbers['WORLD_SIZE']}"
        raise ConfigError("LOCAL_WORLD_SIZE", numbers["LOCAL_WORLD_SIZE"], rule, _FIX)
    if not 0 < numbers["MASTER_PORT"] < 1 << 16:
        raise ConfigError("MASTER_PORT", numbers["MASTER_PORT"], "must be from 1 to 65535", _FIX)
    return Place(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_world_size=numbers["LOCAL_WORLD_SIZE"],
        master_addr=given["MASTER_ADDR"].strip(),
        master_port=numbers["MASTER_PORT"],
    )


def _number(name: str, text: str) -> int:
    if text.strip().isascii() and text.strip().isdecimal():
        return int(text)
    raise ConfigError(name, text, "must be an integer from 0", _FIX)
