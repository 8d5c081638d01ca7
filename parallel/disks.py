"""Finds out which ranks share a disk, since the machines of a run may have disks of their own."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from core.errors import SpotforgeError
from parallel.world import World

_PREFIX = ".disk-"
_NUM_BYTES = 8
_LOOK_AGAIN_S = 1.0
_OLD_S = 86400.0


@dataclass(frozen=True)
class Disks:
    """Says which ranks see the same files under a folder; the lowest of them is their leader.

    Attributes:
        rank: Number of this rank.
        leader_of: Leader of each rank.
        hosts: Host name of each rank.
    """

    rank: int
    leader_of: tuple[int, ...]
    hosts: tuple[str, ...]

    @property
    def leader(self) -> int:
        """Leader of the ranks that share this rank's disk."""
        return self.leader_of[self.rank]

    @property
    def is_leader(self) -> bool:
        """True on one rank of each disk."""
        return self.leader == self.rank

    @property
    def leaders(self) -> list[int]:
        """Leaders of all disks, ascending; rank 0 is the first."""
        return sorted(set(self.leader_of))

    @property
    def is_shared(self) -> bool:
        """True if all ranks share one disk."""
        return len(self.leaders) == 1

    @property
    def sharers(self) -> list[int]:
        """Ranks that share this rank's disk, ascending."""
        return [rank for rank, leader in enumerate(self.leader_of) if leader == self.leader]


def one_disk(world: World) -> Disks:
    """Returns the description of a disk that all ranks share."""
    host = socket.gethostname()
    return Disks(world.rank, (0,) * world.world_size, (host,) * world.world_size)


def find_disks(world: World, folder: Path) -> Disks:
    """Finds out which ranks see the same files under `folder`, which need not exist; collective.

    Each machine writes a file of a random name, and all look which of these files they see. Host
    names and paths tell nothing: two machines may have the same, on one disk or on two. Files that
    were not removed, since a run was killed just then, are removed after a day.

    Raises:
        SpotforgeError: A machine cannot write there.
    """
    if world.world_size == world.local_world_size:
        return one_disk(world)
    while not folder.exists():  # a refused run must leave nothing behind, so nothing is created
        folder = folder.parent
    with _token(world, folder) as own:
        tokens = world.gather(own)  # each was written before it was told
        seen = _look(folder, tokens)
        if len(seen) < len(list(filter(None, tokens))):
            time.sleep(_LOOK_AGAIN_S)  # a shared disk may show a new file to other machines late
            seen = _look(folder, tokens)
        with world.together():
            if not seen:
                writer = world.rank - world.local_rank
                raise SpotforgeError(
                    f"{folder}: a file that rank {writer} wrote there is not seen by rank "
                    f"{world.rank} of the same machine"
                )
        # The first machine whose file one sees is the same for all that share the disk.
        described = world.gather((seen[0], socket.gethostname()))
    return Disks(world.rank, tuple(d[0] for d in described), tuple(d[1] for d in described))


def _look(folder: Path, tokens: list[str | None]) -> list[int]:
    """Returns the ranks whose files are seen; removes files that killed runs left long ago."""
    # Listing the folder also has a network file system ask for what is new in it.
    written_s: dict[Path, float] = {}
    for path in folder.glob(_PREFIX + "[0-9a-f]" * 2 * _NUM_BYTES):
        with suppress(OSError):  # another rank has removed it
            written_s[path] = path.stat().st_mtime
    for path, time_s in written_s.items():
        # By the clock of the disk: that of this machine may be wrong.
        if time_s < max(written_s.values()) - _OLD_S:
            with suppress(OSError):
                path.unlink()
    return [rank for rank, token in enumerate(tokens) if token and (folder / token).exists()]


@contextmanager
def _token(world: World, folder: Path) -> Iterator[str | None]:
    """Yields the name of a file that exists meanwhile; None on all but one rank of a machine."""
    path = folder / f"{_PREFIX}{secrets.token_hex(_NUM_BYTES)}"
    with world.together():
        if world.local_rank == 0:
            try:
                path.touch()
            except OSError as e:
                raise SpotforgeError(f"{folder} cannot be written: {e.strerror}") from e
    try:
        yield path.name if world.local_rank == 0 else None
    finally:
        if world.local_rank == 0:
            path.unlink(missing_ok=True)
