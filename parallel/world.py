"""The ranks of a run: who this process is, and how it agrees with the others."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from core.errors import Interrupted, SpotforgeError
from parallel.launcher import Place, read_place

_TIMEOUT = timedelta(minutes=30)
# One rank may fetch a checkpoint or export for long while the others wait for it. A rank that is
# lost closes its connections, and one that hangs is the supervisor's to find.
_CONTROL_TIMEOUT = timedelta(hours=24)
# The launcher starts all ranks at about the same time; machines that are busy take minutes.
_RENDEZVOUS_S = 600.0
_POLL_S = 0.05
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
def join_world(stop_requested: Callable[[], bool] = lambda: False) -> Iterator[World]:
    """Joins the ranks that the launcher described in the environment; see `parallel.launcher`.

    Without a launcher the world is this one process, with the same groups, so that one code path
    serves both.

    Args:
        stop_requested: Asked while the other ranks are waited for.

    Raises:
        ConfigError: The environment describes half a launcher, or an impossible one.
        Interrupted: Told to stop before all ranks were there.
        SpotforgeError: They were not there in time, or could not be reached.
    """
    place = read_place()
    world = _connect(None) if place is None else _meet(place, stop_requested)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # of this thread; ranks are connected in another
    try:
        yield world
    finally:
        dist.destroy_process_group()
        if place is None:
            os.environ.pop("LOCAL_RANK", None)  # that DeepSpeed was given: half a launcher


def _meet(place: Place, stop_requested: Callable[[], bool]) -> World:
    """Connects in a thread of its own: in C++, where it waits, no signal reaches Python."""
    found: list[World | Exception] = []

    def connect() -> None:
        try:
            found.append(_connect(place))
        except Exception as e:
            found.append(e)

    where = f"rank {place.rank} of {place.world_size} at {place.master_addr}:{place.master_port}"
    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    deadline = time.monotonic() + _RENDEZVOUS_S
    while not found:
        if stop_requested():
            raise Interrupted(f"told to stop while {where} waited for the others; nothing was lost")
        if time.monotonic() > deadline:
            raise SpotforgeError(
                f"{where}: the others did not come within {_RENDEZVOUS_S:.0f} s; look at how they "
                "ended, and start all of them again"
            )
        thread.join(_POLL_S)
    if isinstance(found[0], dist.DistError):
        raise SpotforgeError(f"{where}: {str(found[0]).splitlines()[0]}") from found[0]
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _connect(place: Place | None) -> World:
    rank, world_size, local_rank, local_world_size = 0, 1, 0, 1
    store: dist.Store = dist.HashStore()
    if place is not None:
        local_rank, local_world_size = place.local_rank, place.local_world_size
        store, rank, world_size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=device,
        control=dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT),
        saving=dist.new_group(backend="gloo", timeout=_TIMEOUT),
        store=dist.PrefixStore("spotforge", store),
    )
