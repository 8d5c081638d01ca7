"""The ranks of a run: who this process is, and how it agrees with the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from monitoring.errors import SpotforgeError

_TIMEOUT = timedelta(minutes=30)
# One rank may fetch a checkpoint or export for long while the others wait for it. A rank that is
# lost closes its connections, and one that hangs is the supervisor's to find.
_CONTROL_TIMEOUT = timedelta(hours=24)
_STOP = "stop"
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `world_size` others.

    Attributes:
        device: Where the model lives: this rank's GPU, or the CPU.
        control: gloo group for flags and counts; it never waits for a GPU.
        saving: gloo group of the background thread that writes checkpoints.
        store: Keys that all ranks see, without a collective.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup
    saving: dist.ProcessGroup
    store: dist.Store

    def barrier(self) -> None:
        """Waits until every rank is here."""
        dist.barrier(group=self.control)

    def sum(self, *values: float) -> list[float]:
        """Adds each value up over all ranks; what flags and counts ride on."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def max(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return largest.tolist()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank; it is pickled."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: T) -> T:
        """The first rank's value, on every rank; it is pickled."""
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def announce_stop(self) -> None:
        """Tells the ranks that are not in a collective: they are preparing data, or waiting."""
        self.store.set(_STOP, "")

    def stop_announced(self) -> bool:
        """Whether any rank has announced a stop; asks the store's host."""
        return self.store.check([_STOP])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Runs a block that can fail on one rank alone so that it fails on all or on none.

        Raises:
            SpotforgeError: On every rank, that of the lowest rank on which the block raised one.
        """
        error: SpotforgeError | None = None
        try:
            yield
        except SpotforgeError as e:
            error = e
        for found in self.gather(error):
            if found is not None:
                found.seen_by_all = True
                raise found


@contextmanager
def join_world() -> Iterator[World]:
    """Joins the ranks that the launcher described in the environment (RANK, WORLD_SIZE, ...).

    Without a launcher the world is this one process, with the same groups, so that one code path
    serves both.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    store: dist.Store = dist.HashStore()
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield World(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            device=device,
            control=dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT),
            saving=dist.new_group(backend="gloo", timeout=_TIMEOUT),
            store=dist.PrefixStore("spotforge", store),
        )
    finally:
        dist.destroy_process_group()
