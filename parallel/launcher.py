"""What a launcher (torchrun, `python -m launch supervise`, ...) told this process of its place.

It is read here and nowhere else. Imports no torch: it is asked before there is anything to import.
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
# A job of one process a machine (Kubeflow's PyTorchJob) is told of the others only.
_LOCAL = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
# Launchers that start several on a machine, and number them in words of their own.
_OTHER_LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_FIX = "start the ranks with torchrun, or unset all of " + ", ".join(VARIABLES)


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher started.

    Attributes:
        rank: From 0, of all.
        world_size: How many there are.
        local_rank: From 0, of those on this machine.
        local_world_size: How many are on this machine.
        master_addr: Host at which they meet.
        master_port: Its port.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def read_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place in the environment; None without a launcher.

    Where all but both LOCAL_ variables are there, this is the only process of its machine.

    Raises:
        ConfigError: Some of the variables are there and others are not, or they cannot be true.
    """
    given = {name: environment[name] for name in VARIABLES if name in environment}
    if not given:
        return None
    others = [name for name in _OTHER_LOCAL_RANKS if name in environment]
    if set(VARIABLES) - given.keys() == _LOCAL.keys() and not others:
        given |= _LOCAL
    for name in VARIABLES:
        if not given.get(name, "").strip():
            rule = f"is not set, and {next(iter(given))}={next(iter(given.values()))} is"
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
        raise ConfigError("MASTER_PORT", numbers["MASTER_PORT"], "is no port", _FIX)
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
    raise ConfigError(name, text, "must be a number from 0", _FIX)
