"""Finds the checkpoint to resume from, on the disks of all machines and in the object store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from core import layout
from core.errors import ConfigError, DamagedError
from core.folder import (
    Entry,
    Manifest,
    remove,
    staged_file,
    staged_folder,
    staging_of,
    wrong_content,
)
from trainer.checkpoint import (
    Located,
    committed,
    fetched_folder,
    set_aside,
    step_name,
    verify,
    writer_of,
)
from trainer.distant_file import DistantFile, ReadRange, fetch
from trainer.reporter import Reporter
from trainer.storage import CHECKPOINTS, Storage, read_generation

_UNREADABLE = -1  # generation of a checkpoint whose manifest cannot be read
RESUME = "resume"  # name by which machines serve the folder of a checkpoint that `resume` names


class CheckpointFinder:
    """Finds valid checkpoints.

    Args:
        storage: Storage of the run's checkpoints.
        reporter: Reporter of the checkpoints that are passed over, with reasons.
    """

    def __init__(self, storage: Storage, reporter: Reporter) -> None:
        self._storage, self._reporter, self._world = storage, reporter, storage.world
        self._passed: list[tuple[str, str]] = []

    def find(self, resume: str) -> Located | None:
        """Returns the newest valid checkpoint, or the requested one; collective.

        Args:
            resume: `auto`, `never` or the folder of a checkpoint.

        Returns:
            The checkpoint; None if there is none to resume from.

        Raises:
            DamagedError: The requested checkpoint is damaged, or all existing ones are.
            ConfigError: A checkpoint is missing, or exists where `resume=never` allows none.
        """
        found = self._find_shared if self._storage.disks.is_shared else self._find_apart
        return found(resume)

    def record_passed_over(self) -> None:
        """Records what was passed over, after the events of earlier starts were restored."""
        for name, reason in self._passed:
            self._reporter.event("passed_over", 0, checkpoint=name, reason=reason)
        self._passed = []

    # -- one disk ----------------------------------------------------------------------------------

    def _find_shared(self, resume: str) -> Located | None:
        world, storage = self._world, self._storage
        damaged: DamagedError | None = None
        with world.together():
            candidates = self._candidates(resume) if world.rank == 0 else []
        # All ranks try the same candidates in the same order: what one finds damaged, all pass
        # over.
        for candidate, is_stored in world.from_first(candidates):
            try:
                with world.together():
                    if world.rank == 0 and is_stored:
                        assert storage.remote is not None
                        self._reporter.say(f"fetching {candidate.name} from {storage.remote.url}")
                        storage.remote.download(candidate.name, storage.folder, storage.beat)
                with world.together():
                    verify(candidate, world.rank, world.world_size)
            except DamagedError as e:
                damaged = damaged or e
                self._passed_over(candidate.name, e)
                continue
            return Located(candidate)
        self._refuse(damaged)
        return None

    def _candidates(self, resume: str) -> list[tuple[Path, bool]]:
        """Returns (path, whether to fetch it), newest first and local copies before remote ones."""
        folder, remote = self._storage.folder, self._storage.remote
        if resume not in ("auto", "never"):
            path = Path(resume).expanduser().absolute()
            if not path.is_dir():
                raise _no_such_checkpoint(resume)
            return [(path, False)]
        found = [(path.name, False) for path in committed(folder)]
        if remote is not None:
            found += [(name, True) for name in remote.names()]
        if resume == "never" and found:
            raise _not_new(folder)
        # Descending, so `not` puts the local copy of a step before the remote one.
        found.sort(key=lambda candidate: (candidate[0], not candidate[1]), reverse=True)
        return [(folder / name, stored) for name, stored in found]

    # -- disks of their own ------------------------------------------------------------------------

    def _find_apart(self, resume: str) -> Located | None:
        damaged: DamagedError | None = None
        for candidate in self._survey(resume):
            try:
                return self._locate(candidate)
            except DamagedError as e:
                damaged = damaged or e
                self._passed_over(candidate.name, e)
        self._refuse(damaged)
        return None

    def _refuse(self, damaged: DamagedError | None) -> None:
        """Raises the first damage that was found, if any: starting from scratch would hide it."""
        if damaged is not None:
            self.record_passed_over()
            damaged.seen_by_all = True
            raise damaged

    def _survey(self, resume: str) -> list[_Candidate]:
        """Returns the checkpoints of which any disk or the store has a part, newest first."""
        storage, world = self._storage, self._world
        requested = None
        if resume not in ("auto", "never"):
            requested = Path(resume).expanduser().absolute()
        own: list[_Version] = []
        if storage.disks.is_leader:
            paths = committed(storage.folder) if requested is None else [requested]
            own = [_version(path) for path in paths if path.is_dir()]
        holders: dict[_Version, list[int]] = {}
        for rank, versions in enumerate(world.gather(own)):
            for version in versions:
                holders.setdefault(version, []).append(rank)
        stored: list[_Version] = []
        with world.together():
            if world.rank == 0 and storage.remote is not None and requested is None:
                for name in storage.remote.names():
                    try:
                        found = storage.remote.manifest(name)
                    except DamagedError:
                        stored.append(_Version(name, _UNREADABLE, ""))
                        continue
                    digest = hashlib.sha256(found.content).hexdigest()
                    stored.append(_Version(name, found.generation, digest))
        stored = world.from_first(stored)
        known = sorted(holders.keys() | set(stored), reverse=True)
        if requested is None:
            known = self._without_abandoned(known)
        with world.together():
            if requested is not None and not known:
                raise _no_such_checkpoint(resume)
            if resume == "never" and known:
                raise _not_new(storage.folder)
        folder = storage.folder if requested is None else requested.parent
        served = CHECKPOINTS if requested is None else RESUME
        return [
            _Candidate(v, folder, served, tuple(holders.get(v, ())), v in stored) for v in known
        ]

    def _without_abandoned(self, known: list[_Version]) -> list[_Version]:
        """Returns the checkpoints that the newest start has not left behind; collective.

        A machine that was away when the run went back may still have later ones.
        """
        with self._world.together():
            own = (0, 0)
            if self._storage.disks.is_leader:
                own = read_generation(self._storage.folder)
        newest, step = max(self._world.gather(own))
        kept = []
        for version in known:
            if 0 < version.generation < newest and version.name > step_name(step):
                self._reporter.say(
                    f"passed over: {version.name} of generation {version.generation}: generation "
                    f"{newest} went on from step {step}"
                )
            else:
                kept.append(version)
        return kept

    def _locate(self, candidate: _Candidate) -> Located:
        """Verifies all parts of a checkpoint, and brings its small files to each disk.

        Raises:
            DamagedError: A file is nowhere, or damaged wherever it is.
        """
        storage, world, disks = self._storage, self._world, self._storage.disks
        if candidate.version.generation == _UNREADABLE:
            holders = candidate.holders
            where = f"on {disks.hosts[holders[0]]}" if holders else "in the store"
            raise _incomplete(candidate, f"{layout.MANIFEST} cannot be read {where}")
        content, files = self._manifest_of(candidate)
        good, faults = self._verified(candidate, files)
        for file in sorted(files):
            if file in good or candidate.is_stored:
                continue
            writer = writer_of(file)
            what = "is on no disk of the machines that take part"
            if writer is not None:
                what += f" (rank {writer} wrote it)"
            # All ranks know all of this, so all raise it.
            raise _incomplete(candidate, f"{file} {faults.get(file, what)}")
        if faults:
            file, fault = next(iter(sorted(faults.items())))
            self._reporter.say(f"{candidate.name}: {file} {fault}; its other copy is read")
        is_holder = disks.leader in candidate.holders
        folder = candidate.folder
        if not is_holder and candidate.served == RESUME:
            # Of another run, whose folder is not written to.
            folder = staging_of(storage.folder / RESUME)
        fetched = fetched_folder(storage.folder, candidate.name)
        elsewhere: dict[str, DistantFile] = {}
        small: dict[str, tuple[Entry, list[tuple[str, ReadRange]]]] = {}
        for file, entry in files.items():
            if disks.leader in good.get(file, ()):
                continue
            path = f"{candidate.name}/{file}"
            sources = storage.sources(
                candidate.served, path, good.get(file, ()), candidate.is_stored
            )
            # A checkpoint that was saved to a shared disk has no digests of blocks.
            if writer_of(file) is None or "blocks" not in entry:
                small[file] = entry, sources
            else:
                elsewhere[file] = DistantFile(file, entry, sources, fetched / file)
        with world.together():
            if disks.is_leader:
                try:
                    remove(fetched)  # left by a start that was killed, maybe of another version
                    _bring(folder / candidate.name, is_holder, content, small)
                except OSError as e:
                    raise storage.disk_error(e) from e
        return Located(folder / candidate.name, elsewhere, fetched)

    def _manifest_of(self, candidate: _Candidate) -> tuple[bytes, Manifest]:
        """Returns the manifest of a checkpoint, from whoever has it, and what it lists."""
        world = self._world
        content = b""
        with world.together():
            if candidate.holders and world.rank == candidate.holders[0]:
                content = (candidate.folder / candidate.name / layout.MANIFEST).read_bytes()
            elif not candidate.holders and world.rank == 0:
                assert self._storage.remote is not None
                content = self._storage.remote.manifest(candidate.name).content
        content = next(filter(None, world.gather(content)))
        files: Manifest = json.loads(content)["files"]
        return content, files

    def _verified(
        self, candidate: _Candidate, files: Manifest
    ) -> tuple[dict[str, list[int]], dict[str, str]]:
        """Returns the leaders of the disks that have a whole copy of each file, and the faults."""
        disks, world = self._storage.disks, self._world
        good, faults = set(), {}
        if disks.leader in candidate.holders:
            own = candidate.folder / candidate.name
            first, step = disks.sharers.index(world.rank), len(disks.sharers)
            for file, entry in sorted(files.items())[first::step]:
                if not (own / file).exists():
                    continue
                if fault := wrong_content(own / file, entry, self._storage.beat):
                    faults[file] = f"on {disks.hosts[world.rank]} {fault}"
                else:
                    good.add(file)
        where: dict[str, list[int]] = {}
        all_faults: dict[str, str] = {}
        for rank, (found, wrong) in enumerate(world.gather((good, faults))):
            for file in sorted(found):
                where.setdefault(file, []).append(disks.leader_of[rank])
            all_faults = wrong | all_faults
        return where, all_faults

    def _passed_over(self, name: str, why: DamagedError) -> None:
        self._reporter.say(f"passed over: {why}")
        self._passed.append((name, why.rule))


class _Version(NamedTuple):
    """Identifies a checkpoint; of two that have the same name, the newer start's is the greater."""

    name: str
    generation: int
    manifest_sha256: str


@dataclass(frozen=True)
class _Candidate:
    """Describes a checkpoint of which parts were found.

    Attributes:
        version: Name, generation and digest.
        folder: Folder in which it lies, or will, on every disk.
        served: Name by which machines serve that folder.
        holders: Leaders of the disks that have it, or a part of it.
        is_stored: True if the object store has it.
    """

    version: _Version
    folder: Path
    served: str
    holders: tuple[int, ...]
    is_stored: bool

    @property
    def name(self) -> str:
        return self.version.name


def _version(checkpoint: Path) -> _Version:
    """Returns what identifies a checkpoint on this disk, which has a manifest or a damaged one."""
    try:
        content = (checkpoint / layout.MANIFEST).read_bytes()
        described = json.loads(content)
        _ = described["files"]
        generation = int(described.get("generation", 0))
    except (OSError, ValueError, KeyError, TypeError):
        return _Version(checkpoint.name, _UNREADABLE, "")
    return _Version(checkpoint.name, generation, hashlib.sha256(content).hexdigest())


def _bring(
    checkpoint: Path,
    exists: bool,
    manifest: bytes,
    files: dict[str, tuple[Entry, list[tuple[str, ReadRange]]]],
) -> None:
    """Fetches files of a checkpoint to this disk.

    Args:
        checkpoint: Folder of the checkpoint.
        exists: True if it is there already, with this manifest.
        manifest: Content of its manifest.
        files: Entry and sources of each file to fetch.

    Raises:
        SpotforgeError: A file cannot be fetched.
        OSError: This disk cannot be written.
    """
    if exists:
        for name, (entry, sources) in files.items():
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            with staged_file(checkpoint / name) as staging:
                fetch(name, entry, sources, staging)
        return
    if checkpoint.exists():  # what another start saved at this step; it may yet be wanted
        set_aside(checkpoint)
    with staged_folder(checkpoint) as folder:
        for name, (entry, sources) in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            fetch(name, entry, sources, folder / name)
        (folder / layout.MANIFEST).write_bytes(manifest)


def _incomplete(candidate: _Candidate, rule: str) -> DamagedError:
    where = candidate.folder / candidate.name
    generation = candidate.version.generation
    of = f" of generation {generation}" if generation > 0 else ""
    fix = "start the machine that has it, or resume from another checkpoint"
    return DamagedError("resume", f"{where}{of}", rule, fix)


def _no_such_checkpoint(resume: str) -> ConfigError:
    return ConfigError("resume", resume, "there is no such checkpoint", "auto, never or a folder")


def _not_new(folder: Path) -> ConfigError:
    rule = f"{folder.parent} contains checkpoints of an earlier run"
    fix = "choose another run.name, or use resume=auto to continue it"
    return ConfigError("resume", "never", rule, fix)
