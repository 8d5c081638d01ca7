"""Describes where the checkpoints of a run are: on its machines' disks and in an object store."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core import layout
from core.errors import ConfigError, OwnDiskError, SpotforgeError, SupersededError
from core.folder import write_file
from parallel.disks import Disks
from parallel.peers import PeerFiles
from parallel.world import World
from trainer.distant_file import ReadRange
from trainer.remote import RemoteCheckpoints

CHECKPOINTS = "checkpoints"  # name by which machines serve their checkpoints to each other


@dataclass(frozen=True)
class Storage:
    """Holds what it takes to read and write the checkpoints of a run.

    Attributes:
        folder: Folder of the checkpoints, the same path on all machines.
        world: Ranks of the run.
        disks: Disks of these ranks.
        peers: Files on the disks of other machines; None if all ranks share one.
        remote: Object store; None if there is none.
        beat: Function called regularly during long work, so that it does not look like a hang.
    """

    folder: Path
    world: World
    disks: Disks
    peers: PeerFiles | None = None
    remote: RemoteCheckpoints | None = None
    beat: Callable[[], None] = lambda: None

    def num_replicas(self, setting: str) -> int:
        """Returns the number of other disks that hold a copy of each disk's files.

        Args:
            setting: `auto` or a number; with few disks there are few places for copies.
        """
        wanted = 1 if setting == "auto" else int(setting)
        return min(wanted, len(self.disks.leaders) - 1)

    def sources(
        self, served: str, path: str, leaders: Iterable[int], is_stored: bool
    ) -> list[tuple[str, ReadRange]]:
        """Returns the places from which a file can be read, each with its name, peers first.

        Args:
            served: Name of the folder, as machines serve it.
            path: Path of the file in it: name of the checkpoint, then name of the file.
            leaders: Leaders of the disks that have the file.
            is_stored: True if the object store has it.
        """
        own, size = self.disks.leader, self.world.world_size
        found: list[tuple[str, ReadRange]] = []
        # Each machine begins with another one, so that not all ask the same.
        for leader in sorted(set(leaders) - {own}, key=lambda leader: (leader - own) % size):
            assert self.peers is not None
            read = partial(self.peers.read, leader, served, path)
            found.append((f"rank {leader} on {self.disks.hosts[leader]}", self._beating(read)))
        if is_stored:
            assert self.remote is not None
            name, _, file = path.partition("/")
            stored = partial(self.remote.read_range, name, file)
            found.append((self.remote.url, self._beating(stored)))
        return found

    def disk_error(self, cause: OSError) -> ConfigError:
        """Returns the error for a disk of this machine that cannot be written."""
        rule, run_dir = cause.strerror or str(cause), self.folder.parent
        if self.disks.is_shared:
            fix = "free some space, then run the same command again"
            return ConfigError("run.dir", run_dir, rule, fix)
        rank = self.world.rank
        rule = f"the disk of {self.disks.hosts[rank]} could not be written: {rule}"
        fix = "free some space, then start that machine again"
        return OwnDiskError("run.dir", run_dir, rule, fix, rank)

    def _beating(self, read: ReadRange) -> ReadRange:
        def beating(offset: int, length: int) -> bytes:
            self.beat()
            return read(offset, length)

        return beating


class Generation:
    """Numbers the starts of a run, so that an older one that still lives commits nothing more.

    Machines that were cut off may come back, and somebody may start the same run twice. The number
    is written beside the checkpoints on every disk and in the object store; whoever finds a higher
    one there than its own has been replaced.

    Args:
        storage: Storage of the checkpoints.
        number: Number of this start.
    """

    def __init__(self, storage: Storage, number: int) -> None:
        self._storage, self.number = storage, number

    @staticmethod
    def claim(storage: Storage, step: int) -> Generation:
        """Returns the generation of this start, the highest there is; collective.

        Args:
            storage: Storage of the checkpoints.
            step: Step from which this start goes on. What older starts have saved after it is
                abandoned.

        Raises:
            SpotforgeError: A disk or the object store cannot be written, or an older start was
                still going on.
            SupersededError: Another start began at the same time.
        """
        world, disks, remote = storage.world, storage.disks, storage.remote
        with world.together():
            known = read_generation(storage.folder)[0] if disks.is_leader else 0
            if world.rank == 0 and remote is not None:
                known = max(known, remote.generation())
        number = 1 + max(world.gather(known))
        with world.together():
            if world.rank == 0 and remote is not None and (unknown := remote.claim(number)):
                raise SpotforgeError(
                    f"checkpoint.upload={remote.url}: an older start of this run, which was still "
                    f"going on, has uploaded {unknown[0]} meanwhile; start again"
                )
            if disks.is_leader:
                try:
                    storage.folder.mkdir(parents=True, exist_ok=True)
                    owner = f"({socket.gethostname()}, process {os.getpid()})"
                    text = f"{number} from step {step} {owner}\n"
                    write_file(storage.folder / layout.GENERATION, text)
                except OSError as e:
                    raise storage.disk_error(e) from e
        return Generation(storage, number)

    def check(self) -> None:
        """Raises SupersededError if a newer start of the run has taken over this disk."""
        found, _ = read_generation(self._storage.folder)
        if found > self.number:
            path = self._storage.folder / layout.GENERATION
            raise SupersededError(
                "run.dir",
                self._storage.folder.parent,
                f"generation {self.number} commits nothing more: generation "
                f"{path.read_text().strip()} has taken over",
                "let that one go on, or give this run another run.name",
            )


def read_generation(folder: Path) -> tuple[int, int]:
    """Returns the number of the newest start of a run, and the step from which it went on.

    Both are 0 for runs from before there were any.
    """
    try:
        words = (folder / layout.GENERATION).read_text().split()
        return int(words[0]), int(words[3])
    except FileNotFoundError:
        return 0, 0
    except (ValueError, IndexError) as e:
        raise SpotforgeError(
            f"{folder / layout.GENERATION} does not begin with `NUMBER from step NUMBER`; correct "
            "it, or remove the file"
        ) from e
