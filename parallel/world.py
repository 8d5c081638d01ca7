"""The ranks of a run: the place of this process among them, and how they agree."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from core.errors import ExitCode, Interrupted, SpotforgeError
from parallel.launcher import Place, read_place
from parallel.network import check_reachable, choose_interface
from parallel.watch import watching

_TIMEOUT = timedelta(minutes=30)
# One rank may fetch a checkpoint or export for a long time while the others wait for it. A lost
# rank closes its connections, `watch.py` notices a lost machine, and the supervisor finds a rank
# that hangs, so a long timeout does no harm.
_CONTROL_TIMEOUT = timedelta(hours=24)
# The launcher starts all ranks at about the same time, but a busy machine may take minutes.
_RENDEZVOUS_S = 600.0
_POLL_S = 0.05
_LONGEST_POLL_S = 0.5
_STOP = "stop"
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Represents this process among `world_size` ranks, and communicates with the others.

    Attributes:
        device: Device of the model: the GPU of this rank, or the CPU.
        address: Address at which this rank's machine is reached by the others.
        control: gloo group for flags and counts, which never waits for a GPU.
        saving: gloo group of the background thread that writes checkpoints. A group of its own
            keeps its collectives from mixing with those of the loop.
        store: Keys that all ranks can read and write without a collective.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    address: str
    control: dist.ProcessGroup
    saving: dist.ProcessGroup
    store: dist.Store

    def barrier(self) -> None:
        """Waits until every rank has called it."""
        dist.barrier(group=self.control)

    def barrier_with(self, between: Callable[[], None]) -> None:
        """Waits until every rank has called it, and calls `between` twice a second.

        In other collectives a rank hears of no stop. Here `between` may raise to end the wait; the
        next collective is then the same as for ranks that have not ended it.
        """
        work = dist.barrier(group=self.control, async_op=True)
        wait_s = _POLL_S
        while not work.is_completed():
            between()
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_POLL_S)
        work.wait()  # raises the error of a lost rank

    def sum(self, *values: float) -> list[float]:
        """Returns the sum of each value over all ranks; used for flags and counts."""
        # float64 is exact for integers up to 2**53, more than any count of tokens.
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def max(self, *values: float) -> list[float]:
        """Returns the maximum of each value over all ranks."""
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return largest.tolist()

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, on every rank; values are pickled."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: T) -> T:
        """Returns the first rank's value, on every rank; the value is pickled."""
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def announce_stop(self) -> None:
        """Tells ranks that are outside of collectives, preparing data or waiting, to stop."""
        self.store.set(_STOP, "")

    def stop_announced(self) -> bool:
        """Returns whether any rank has announced a stop; asks the host of the store."""
        return self.store.check([_STOP])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Makes a block that can fail on one rank fail on all ranks or on none.

        Raises:
            SpotforgeError: The error of the lowest rank on which the block raised one.
        """
        error: SpotforgeError | None = None
        try:
            yield
        except SpotforgeError as e:
            error = e
        # Every rank reaches this collective, whether its block failed or not. Other exceptions are
        # bugs and pass through: the rank dies, and its lost connection ends the others.
        for found in self.gather(error):
            if found is not None:
                found.seen_by_all = True
                raise found


@contextmanager
def join_world(stop_requested: Callable[[], bool] = lambda: False) -> Iterator[World]:
    """Joins the ranks that the launcher describes in the environment; see `parallel.launcher`.

    Without a launcher the world is this one process, with the same groups, so that the same code
    serves both cases.

    Args:
        stop_requested: Function that is polled while the other ranks are awaited.

    Raises:
        ConfigError: The environment of the launcher is incomplete or contradictory.
        Interrupted: A stop was requested before all ranks had joined.
        SpotforgeError: The other ranks did not join in time, or could not be reached.
    """
    place = read_place()
    world = _connect(None) if place is None else _meet(place, stop_requested)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # per thread, and _connect ran in another one
    try:
        with watching(world):
            yield world
    finally:
        dist.destroy_process_group()
        if place is None:  # remove what DeepSpeed was given: it would look like half a launcher
            os.environ.pop("LOCAL_RANK", None)


def _meet(place: Place, stop_requested: Callable[[], bool]) -> World:
    """Connects in a separate thread, since no signal reaches Python while C++ waits."""
    found: list[World | Exception] = []

    def connect() -> None:
        try:
            found.append(_connect(place))
        except Exception as e:
            found.append(e)

    master = f"{place.master_addr}:{place.master_port}"
    where = f"rank {place.rank} of {place.world_size} (master at {master})"
    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    deadline = time.monotonic() + _RENDEZVOUS_S
    while not found:
        if stop_requested():
            _leave_waiting(ExitCode.START_AGAIN)
            raise Interrupted(f"told to stop while {where} waited for the others; nothing was lost")
        if time.monotonic() > deadline:
            _leave_waiting(ExitCode.FAILED)
            raise SpotforgeError(
                f"{where}: the other ranks did not join within {_RENDEZVOUS_S:.0f} s; see how they "
                "ended, and start all ranks again"
            )
        thread.join(_POLL_S)
    if isinstance(found[0], dist.DistError):
        raise SpotforgeError(f"{where}: {str(found[0]).splitlines()[0]}") from found[0]
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _leave_waiting(code: ExitCode) -> None:
    """Makes this process end without destroying what the other thread still uses.

    It cannot be told to stop while it waits in C++, and at the usual end of a process it would
    abort it: the launcher would see a crash.
    """

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(end)


def _connect(place: Place | None) -> World:
    rank, world_size, local_rank, local_world_size = 0, 1, 0, 1
    store: dist.Store = dist.HashStore()
    address = "127.0.0.1"
    if place is not None:
        local_rank, local_world_size = place.local_rank, place.local_world_size
        store, rank, world_size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        if world_size > local_world_size:
            network = dist.PrefixStore("network", store)
            address = choose_interface(network, rank, world_size, place.master_addr)
            check_reachable(network, rank, local_rank, world_size, address)
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
        address=address,
        control=dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT),
        saving=dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT),
        store=dist.PrefixStore("spotforge", store),
    )
