"""Prepares data on all machines of a run, whose disks and sources may differ.

    the sources can be opened here     prepared here, unless `data.cache_url` has the result
    not here, but on another machine   fetched from the disk of that machine
    nowhere, but the run is resumed    what its `data.json` names, from any disk or the store

Ranks that share the disk of `data.cache_dir` do this once, behind the locks of `cache.py`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from core import layout
from core.errors import ConfigError, DamagedError, SpotforgeError
from parallel.disks import Disks, find_disks
from parallel.peers import PeerFiles
from parallel.world import World
from trainer.data.cache import KEY as CACHE_KEY
from trainer.data.cache import build_once, cache_folder, open_cache
from trainer.data.config import DataConfig, PreparationConfig, SourceKind
from trainer.data.fetch import DataStore, PeerFolder, fetch_folder
from trainer.data.files import check_stop
from trainer.data.prepare import Plan, PreparedData, named_sources, open_prepared, open_store
from trainer.data.tokens import read_manifest
from trainer.data.writer import given_name
from trainer.process import Process

SERVED = "data"  # name by which machines serve their caches to each other

Names = dict[str, str]  # name in a cache of each source's folder, by the name of the source
# Where the folder of each source is on a machine: name of what is served, path in it, path there.
Places = dict[str, tuple[str, str, str]]


def find_cache_disks(world: World, cfg: PreparationConfig) -> Disks:
    """Finds out which ranks share the disk of the cache; collective."""
    folder = existing = cache_folder(cfg.cache_dir)
    while not existing.exists():
        existing = existing.parent
    if all(world.gather(os.access(existing, os.W_OK | os.X_OK))):
        return find_disks(world, folder)
    # Not an error yet: tokens that all machines have need no cache.
    told = world.gather((world.rank - world.local_rank, socket.gethostname()))
    return Disks(world.rank, tuple(t[0] for t in told), tuple(t[1] for t in told))


def recorded_names(folder: Path, cfg: DataConfig) -> Names | None:
    """Returns the prepared folders that a `data.json` names; None if it names other sources.

    Args:
        folder: Folder that may have such a file: of a run, or of what a checkpoint has of its logs.
        cfg: Settings of the data.
    """
    sources = named_sources(cfg)
    names: Names = {}
    try:
        for entry in json.loads((folder / layout.DATA).read_text())["sources"]:
            is_given = sources[entry["name"]][1].kind is SourceKind.tokens
            name = given_name(entry["digest"]) if is_given else Path(entry["folder"]).name
            names[entry["name"]] = name
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return names if names.keys() == sources.keys() else None


class DataExchange:
    """Prepares the data of a run, together with the other ranks.

    Args:
        cfg: Settings of the data.
        process: Process of this rank, which polls for a stop.
        disks: Ranks that share the disk of the cache.
        peers: Files of the other disks, whose caches are served as `SERVED`.
    """

    def __init__(self, cfg: DataConfig, process: Process, disks: Disks, peers: PeerFiles) -> None:
        self._cfg, self._process, self._disks, self._peers = cfg, process, disks, peers
        self._world = process.world

    def prepare(
        self, make_plan: Callable[[], Plan], recall: Callable[[], Names | None] = lambda: None
    ) -> PreparedData:
        """Returns the data, which is the same on all ranks; collective.

        Args:
            make_plan: Function that opens the sources on this machine.
            recall: Function that returns what this machine knows of the data of the run to be
                resumed.

        Raises:
            ConfigError: No machine can open the sources, or those of two machines differ.
            DamagedError: What was prepared or fetched was altered.
            SpotforgeError: A machine that has the data does not answer.
            Interrupted: A stop was requested; no partial result is left behind.
        """
        world = self._world
        with self._at_own_pace():
            store = open_store(self._cfg)
            plan, refusal = _opened(make_plan)
            known = recall() if plan is None else _names(plan)
        names = self._agree(known, refusal)
        with self._at_own_pace():
            if plan is not None:
                plan.make(store)
                self._serve_given(plan)
        places = world.gather(self._places(names, plan))
        with self._at_own_pace():
            if plan is None:
                assert refusal is not None
                fetch = partial(self._fetch, places=places, store=store, refusal=refusal)
                folders = {source: fetch(source, name) for source, name in names.items()}
            else:
                folders = plan.folders
        with self._at_own_pace():
            if world.rank == 0 and store is not None:
                for source, name in names.items():
                    store.upload(name, folders[source], self._process.poll_apart)
        with world.together():
            data = open_prepared(self._cfg, folders)
        self._check_same({"data": data.digest, "data.tokenizer": data.tokenizer_fingerprint})
        return data

    def share_of(self, folder: Path) -> tuple[int, int]:
        """Returns the number of this rank among those that share a folder, and their number."""
        if folder.is_relative_to(cache_folder(self._cfg.cache_dir)):
            return self._disks.sharers.index(self._world.rank), len(self._disks.sharers)
        return self._world.local_rank, self._world.local_world_size

    @contextmanager
    def _at_own_pace(self) -> Iterator[None]:
        """Makes a block fail on all ranks or on none, and polls while other ranks are in it.

        A rank that waits in a collective would not hear of a stop, and a block may take hours.
        """
        with self._world.together():
            try:
                yield
            except SpotforgeError:
                self._wait_for_all()
                raise
            self._wait_for_all()

    def _wait_for_all(self) -> None:
        self._world.barrier_with(lambda: check_stop(self._process.poll_apart))

    def _agree(self, known: Names | None, refusal: ConfigError | None) -> Names:
        """Returns the names of the folders that all ranks need.

        Args:
            known: Names of what this machine's sources become, or of what the run to be resumed was
                trained on.
            refusal: Error that the sources cannot be opened on this machine; None if they can.
        """
        own = known if refusal is None else None
        self._check_same(own and {self._key(source): name for source, name in own.items()})
        told = self._world.gather((refusal, known))
        if found := [names for refused, names in told if refused is None and names is not None]:
            return found[0]
        refusal = told[0][0]
        assert refusal is not None
        recalled = [names for _, names in told if names is not None]
        with self._world.together():
            if not recalled:
                raise refusal
        if self._world.rank == 0:
            print(
                f"{refusal.key}={refusal.value}: {refusal.rule}, on all machines; taking "
                f"{', '.join(recalled[0].values())}, on which the run was trained",
                file=sys.stderr,
            )
        return recalled[0]

    def _key(self, source: str) -> str:
        return named_sources(self._cfg)[source][0]

    def _check_same(self, own: dict[str, str] | None) -> None:
        """Raises ConfigError on all ranks if the values of two ranks differ; None is no value."""
        told = [(rank, values) for rank, values in enumerate(self._world.gather(own)) if values]
        with self._world.together():
            for rank, values in told:
                first_rank, expected = told[0]
                for key, value in values.items():
                    if value != expected.get(key):
                        raise ConfigError(
                            key,
                            value,
                            f"is the digest on {self._where(rank)}, but "
                            f"{expected.get(key, 'there is none')} on {self._where(first_rank)}",
                            "make the sources the same on all machines, or remove them from all "
                            "but one, and the others fetch what that one prepares",
                        )

    def _where(self, rank: int) -> str:
        return f"rank {rank} on {self._disks.hosts[rank]}"

    def _serve_given(self, plan: Plan) -> None:
        for source in plan.given:
            self._peers.serve(f"{SERVED}/{source}", plan.folders[source])

    def _places(self, names: Names, plan: Plan | None) -> Places:
        """Returns where this rank has folders that other ranks may need."""
        cache = cache_folder(self._cfg.cache_dir)
        places: Places = {}
        for source, name in names.items():
            if plan is not None and source in plan.given:
                places[source] = (f"{SERVED}/{source}", ".", str(plan.folders[source]))
            elif (cache / name).exists():
                places[source] = (SERVED, name, str(cache / name))
        return places

    def _fetch(
        self,
        source: str,
        name: str,
        places: list[Places],
        store: DataStore | None,
        refusal: ConfigError,
    ) -> Path:
        """Returns the folder of a source that cannot be opened here, fetched if it is missing."""
        own, stop_requested = self._disks.leader, self._process.poll_apart
        # Each disk begins with another one, so that not all ask the same.
        others = sorted(self._disks.leaders, key=lambda rank: (rank - own) % len(places))
        others = [rank for rank in others if rank != own and source in places[rank]]

        def fill(staging: Path) -> None:
            print(
                f"{refusal.key}={refusal.value}: {refusal.rule}, on this machine", file=sys.stderr
            )
            problems: list[str] = []
            damaged: DamagedError | None = None
            for rank in others:
                host = self._disks.hosts[rank]
                origin = PeerFolder(self._peers, rank, host, *places[rank][source])
                try:
                    fetch_folder(origin, name, staging, stop_requested)
                except OSError as e:
                    if e.errno is not None:  # of this disk
                        raise
                    problems.append(str(e))
                except DamagedError as e:  # what another one has may be whole
                    print(e, file=sys.stderr)
                    damaged = damaged or e
                else:
                    return
            if store is None or not store.fetch(name, staging, stop_requested):
                if damaged is not None:
                    raise damaged
                if problems:
                    raise SpotforgeError(f"{name} cannot be fetched: {'; '.join(problems)}")
                raise refusal

        folder = open_cache(self._cfg.cache_dir) / name
        build_once(folder, fill, stop_requested)
        return folder


def _opened(make_plan: Callable[[], Plan]) -> tuple[Plan | None, ConfigError | None]:
    """Returns the plan, or why the sources cannot be opened on this machine."""
    try:
        return make_plan(), None
    except DamagedError:
        raise
    except ConfigError as e:
        if e.key == CACHE_KEY:
            raise
        return None, e


def _names(plan: Plan) -> Names:
    return {
        source: given_name(read_manifest(folder)["digest"]) if source in plan.given else folder.name
        for source, folder in plan.folders.items()
    }
