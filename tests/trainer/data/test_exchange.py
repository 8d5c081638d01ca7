"""Data on machines whose disks and sources differ: prepared on one, fetched by the others."""

import contextlib
import errno
import io
import json
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import parallel.disks
from core.errors import ConfigError, DamagedError, ExitCode, Interrupted, SpotforgeError
from core.folder import entry_of, manifest_of
from parallel.disks import Disks
from parallel.peers import PeerFiles
from parallel.world import join_world
from tests import object_store
from tests.distributed import run_distributed
from tests.object_store import ObjectStore, StoreError
from tests.trainer.data.samples import make_texts, write_folder
from tests.trainer.small_config import LLAMA, small_config, write_sources
from trainer import store
from trainer.data.cache import cache_folder
from trainer.data.config import SingleDataConfig, SourceKind
from trainer.data.exchange import SERVED, DataExchange, find_cache_disks, recorded_names
from trainer.data.fetch import DataStore
from trainer.data.files import check_stop
from trainer.data.prepare import Plan, make_plan, prepare
from trainer.data.writer import canonical_digest
from trainer.heartbeat import Heartbeat
from trainer.process import Process
from trainer.run import train_in
from trainer.stopping import StopSignal


def settings(machine, **changes):
    """Data of one machine: its own path, on its own disk."""
    values = {
        "kind": SourceKind.text,
        "path": str(machine / "texts"),
        "cache_dir": str(machine / "cache"),
        "tokenizer_vocab_size": 300,
        "validation_fraction": 0.2,
        "shard_tokens": 1000,
    }
    return SingleDataConfig(**values | changes)


def prepared(machine):
    return prepare(settings(machine), model_path=None, stop_requested=lambda: False)


def signed(manifest):
    """A manifest with the digest that belongs to its content."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return json.dumps(content | {"digest": canonical_digest(content)}).encode()


def flip(file, position=7):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@dataclass
class Outcome:
    """What one rank got, or its error, and what it printed."""

    said: str
    digest: str | None = None
    folder: Path | None = None
    error: SpotforgeError | None = None


def exchange(world, cfg, process=None, plan=None):
    """Prepares data together with the other ranks, as a run does."""
    process = process or Process(world, StopSignal(), Heartbeat())
    plan = plan or partial(make_plan, cfg, model_path=None, stop_requested=process.poll_apart)
    recall = partial(recorded_names, Path(cfg.cache_dir).parent / "run", cfg)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            disks = find_cache_disks(world, cfg)
            with PeerFiles(world, disks, {SERVED: cache_folder(cfg.cache_dir)}) as peers:
                together = DataExchange(cfg, process, disks, peers)
                data = together.prepare(plan, recall)
                data.verify(together.share_of)
        except SpotforgeError as e:
            return Outcome(said.getvalue(), error=e)
    return Outcome(said.getvalue(), data.digest, data.folders[0])


def set_up(base):
    """Two machines for each case; `0` and `1` are their disks."""

    def texts(name, rank, seed=0):
        write_folder(base / name / str(rank) / "texts", make_texts(60, seed))

    for name in CASES:
        for rank in (0, 1):
            (base / name / str(rank)).mkdir(parents=True)
    for name in ("fetched", "damaged", "uploaded"):
        texts(name, 0)
    for rank in (0, 1):
        texts("differing", rank, seed=rank)
        texts("downloaded", rank)
    made = prepared(base / "damaged" / "0")
    flip(made.folders[0] / "train-00001.bin")
    # Both have the same sources, of which rank 1 has prepared something else under that name.
    for rank in (0, 1):
        texts("altered", rank)
    folder = prepared(base / "altered" / "1").folders[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    flip(folder / "train-00000.bin")
    entry = entry_of(folder / "train-00000.bin")
    manifest["splits"]["train"]["shards"][0] |= entry
    (folder / "manifest.json").write_bytes(signed(manifest))
    # Rank 0 has nothing, rank 1 what a run was trained on, of which its record tells.
    texts("resumed", 1)
    made = prepared(base / "resumed" / "1")
    (base / "resumed" / "1" / "run").mkdir()
    (base / "resumed" / "1" / "run" / "data.json").write_text(json.dumps(made.describe()))
    shutil.rmtree(base / "resumed" / "1" / "texts")
    shutil.copytree(made.folders[0], base / "given" / "1" / "texts")


CASES = (
    "stopped",
    "fetched",
    "differing",
    "damaged",
    "given",
    "resumed",
    "nowhere",
    "uploaded",
    "downloaded",
)


def play(base):
    """Plays all cases on two ranks, each on a machine of its own."""
    parallel.disks._LOOK_AGAIN_S = 0.0  # of this process
    with join_world() as world:
        outcomes = {}

        def case(name, name_of_machine=None, **changes):
            machine = base / (name_of_machine or name) / str(world.rank)
            outcomes[name] = exchange(world, settings(machine, **changes))

        for name in ("fetched", "differing", "altered", "damaged", "resumed", "nowhere"):
            case(name)
        case("again", "fetched")
        case("given", kind=SourceKind.tokens, tokenizer_vocab_size=4096)
        for name in ("uploaded", "downloaded"):
            case(name, cache_url=f"file://{base}/store")
        outcomes["stopped"] = stopped_while_waiting(world, base / "stopped" / str(world.rank))
    return outcomes


def stopped_while_waiting(world, machine):
    """Rank 1 has nothing to do, and is told to stop while rank 0 works."""
    stop = StopSignal()
    process = Process(world, stop, Heartbeat())

    def work(_):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            check_stop(process.poll_apart)
            time.sleep(0.01)

    plan = Plan({"text": machine / "x"}, {"text": work}, process.poll_apart)
    if world.rank == 1:
        plan.make = lambda _: stop._reasons.append("told")
    return exchange(world, settings(machine), process, lambda: plan)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    set_up(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(base):
    """{case: outcomes of rank 0 and rank 1}."""
    found = run_distributed(play, 2, base, apart=True)
    return {name: [outcome[name] for outcome in found] for name in found[0]}


def assert_same_and_own(outcomes, base, name):
    """Both ranks have the same data, each in its own cache."""
    assert [o.error for o in outcomes] == [None, None]
    assert outcomes[0].digest == outcomes[1].digest
    for rank, outcome in enumerate(outcomes):
        assert outcome.folder.parent == base / name / str(rank) / "cache"
    assert manifest_of(outcomes[0].folder) == manifest_of(outcomes[1].folder)


def test_a_machine_without_the_sources_fetches_what_another_one_prepared(outcomes, base):
    first, second = outcomes["fetched"]
    assert_same_and_own([first, second], base, "fetched")
    assert first.folder.name == second.folder.name
    assert "fetching" not in first.said
    assert f"data.path={base}/fetched/1/texts: no such file" in second.said
    assert f"fetching {first.folder.name}" in second.said and "from rank 0 on" in second.said
    assert not list((base / "fetched" / "1" / "cache").glob("*staging*"))
    # Once it is there, nothing is fetched.
    assert [o.digest for o in outcomes["again"]] == [first.digest] * 2
    assert all("fetching" not in o.said for o in outcomes["again"])


def test_machines_whose_sources_differ_are_refused_before_anything_is_prepared(outcomes, base):
    for rank, outcome in enumerate(outcomes["differing"]):
        assert isinstance(outcome.error, ConfigError) and outcome.error.key == "data"
        assert outcome.error.exit_code == ExitCode.BAD_CONFIG
        assert "rank 0 on" in str(outcome.error) and "rank 1 on" in str(outcome.error)
        assert "\n" not in str(outcome.error)
        cache = base / "differing" / str(rank) / "cache"
        assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_data_that_differs_under_the_same_name_is_refused(outcomes):
    for outcome in outcomes["altered"]:
        assert isinstance(outcome.error, ConfigError) and outcome.error.key == "data"
        assert "rank 0 on" in str(outcome.error) and "rank 1 on" in str(outcome.error)


def test_what_arrives_damaged_is_refused_by_name(outcomes, base):
    for outcome in outcomes["damaged"]:
        assert isinstance(outcome.error, DamagedError)
        assert "train-00001.bin of rank 0 on" in str(outcome.error)
        assert "SHA-256" in outcome.error.rule
    cache = base / "damaged" / "1" / "cache"
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_a_folder_of_tokens_that_a_machine_lacks_is_fetched_into_its_cache(outcomes, base):
    first, second = outcomes["given"]
    assert [first.error, second.error] == [None, None]
    assert second.folder == base / "given" / "1" / "texts"
    assert first.folder.parent == base / "given" / "0" / "cache"
    assert first.digest == second.digest
    assert manifest_of(first.folder) == manifest_of(second.folder)


def test_a_resumed_run_takes_its_data_from_any_cache_if_nobody_has_the_sources(outcomes, base):
    first, second = outcomes["resumed"]
    assert_same_and_own([first, second], base, "resumed")
    assert "on all machines; taking" in first.said and "from rank 1 on" in first.said
    assert "fetching" not in second.said


def test_if_nobody_has_anything_the_first_rank_says_what_is_missing(outcomes, base):
    for outcome in outcomes["nowhere"]:
        assert isinstance(outcome.error, ConfigError)
        assert str(outcome.error).startswith(f"data.path={base}/nowhere/0/texts: no such file")


def test_what_the_store_has_is_not_prepared_again(outcomes, base):
    assert_same_and_own(outcomes["uploaded"], base, "uploaded")
    [folder] = (base / "store").iterdir()
    made = outcomes["uploaded"][0].folder
    assert folder.name == made.name and manifest_of(folder) == manifest_of(made)
    assert_same_and_own(outcomes["downloaded"], base, "downloaded")
    for rank, outcome in enumerate(outcomes["downloaded"]):
        assert outcome.digest == outcomes["uploaded"][0].digest
        assert f"from file://{base}/store" in outcome.said
        # Preparing would have trained a tokenizer.
        assert not list((base / "downloaded" / str(rank) / "cache").glob("tokenizer-*"))


def test_a_rank_that_waits_for_others_hears_of_a_stop(outcomes):
    for outcome in outcomes["stopped"]:
        assert isinstance(outcome.error, Interrupted)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with texts, and `double://`, whose requests are repeated at once."""
    write_folder(tmp_path / "texts", make_texts(60))
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("OBJECT_STORE_FOLDER", str(tmp_path / "store"))
    monkeypatch.setattr(store, "_BACKOFF_S", 0.001)
    return tmp_path


def alone(machine, url="double://bucket/data", cache="cache"):
    """Prepares data on one rank; its cache is `cache`."""
    cfg = settings(machine, cache_url=url, cache_dir=str(machine / cache))
    with join_world() as world:
        return exchange(world, cfg)


def test_a_folder_is_in_the_store_once_its_manifest_is(machine, monkeypatch):
    name = alone(machine).folder.name
    puts = [line for line in object_store.operations() if line.startswith("put ")]
    assert puts[-1] == f"put bucket/data/{name}/manifest.json"
    assert len(puts) == len(object_store.objects())
    alone(machine)  # what is there is left
    assert [line for line in object_store.operations() if line.startswith("put ")] == puts
    # An upload that was cut short is no folder, and the next start completes it.
    (machine / "store" / f"bucket%2Fdata%2F{name}%2Fmanifest%2Ejson").unlink()
    assert "fetching" not in alone(machine, cache="cache2").said
    assert f"bucket/data/{name}/manifest.json" in object_store.objects()


def test_a_damaged_object_is_refused_by_name(machine):
    name = alone(machine).folder.name
    key = f"bucket/data/{name}/train-00000.bin"
    whole = object_store.objects()
    manifest = f"bucket/data/{name}/manifest.json"
    outside = json.loads(whole[manifest])
    outside["splits"]["train"]["shards"][0]["file"] = "../../outside"
    for damaged, content, named in [
        (key, whole[key][:-1] + b"?", "train-00000.bin"),
        (key, whole[key][:-1], "train-00000.bin"),
        (manifest, whole[manifest].replace(b'"train"', b'"brain"', 1), "manifest.json"),
        (manifest, signed(outside), "'../../outside'"),
        (manifest, signed(outside | {"source": {"kind": "other"}}), f"is not that of {name}"),
    ]:
        object_store.damage(damaged, content)
        error = alone(machine, cache="cache2").error
        assert isinstance(error, DamagedError) and error.key == "data.cache_url", damaged
        assert named in str(error) and f"double://bucket/data/{name}" in str(error)
        assert not [p for p in (machine / "cache2").iterdir() if p.is_dir()]
        object_store.damage(damaged, whole[damaged])
    assert alone(machine, cache="cache2").error is None


def test_a_store_that_is_away_does_not_end_a_run_that_can_prepare(machine, monkeypatch):
    def away(*_, **__):
        raise StoreError("503 Slow Down")

    with monkeypatch.context() as patch:
        for method in ("cat_file", "put_file", "info"):
            patch.setattr(ObjectStore, method, away)
        outcome = alone(machine)
    assert outcome.error is None and outcome.digest is not None
    assert "going on without it" in outcome.said and "at the next start" in outcome.said


def test_a_fetch_that_fails_leaves_nothing_in_the_way(machine, monkeypatch):
    name, get_file, found = alone(machine).folder.name, ObjectStore.get_file, []

    def breaks_off(self, path, *args, **kwargs):
        if path.endswith("tokenizer.json"):
            raise StoreError("503 Slow Down")
        get_file(self, path, *args, **kwargs)

    monkeypatch.setattr(ObjectStore, "get_file", breaks_off)
    (machine / "cache2").mkdir()
    folders = {"text": machine / "cache2" / name}
    builders = {"text": lambda staging: found.append(list(staging.iterdir()))}
    Plan(folders, builders, lambda: False).make(DataStore("double://bucket/data"))
    assert found == [[]]


def test_a_url_that_cannot_be_used_is_refused(machine, monkeypatch):
    for url in ("bucket/data", "nosuch://bucket/data"):
        error = alone(machine, url).error
        assert isinstance(error, ConfigError) and error.key == "data.cache_url"
    monkeypatch.setenv("OBJECT_STORE_FAULTS", "refuse=1")
    error = alone(machine).error
    assert isinstance(error, ConfigError) and "may not be read" in error.rule


def test_tokens_that_a_machine_has_need_no_cache(machine):
    folder = prepared(machine).folders[0]
    nowhere = str(machine / "texts" / "0000.txt" / "cache")
    tokens = {"kind": SourceKind.tokens, "path": str(folder), "tokenizer_vocab_size": 4096}
    with join_world() as world:
        outcome = exchange(world, settings(machine, **tokens, cache_dir=nowhere))
    assert outcome.folder == folder


class OtherMachines:
    """Disks of ranks 1 and 2: `faults` maps a rank to what its first piece of a shard raises."""

    def __init__(self, cache, faults):
        self._cache, self._faults = cache, faults
        self.asked = []

    def size_of(self, rank, served, path):
        return (self._cache / path).stat().st_size

    def read(self, rank, served, path, offset, length):
        self.asked.append(rank)
        if path.endswith(".bin") and rank in self._faults:
            raise self._faults[rank]
        return (self._cache / path).read_bytes()[offset : offset + length]


def fetched(machine, faults):
    """Fetches the data of `machine` to the disk of rank 0."""
    made = prepared(machine).folders[0]
    cfg = settings(machine, path="nowhere", cache_dir=str(machine / "cache0"))
    disks = Disks(0, (0, 1, 2), ("a", "b", "c"))
    peers = OtherMachines(made.parent, faults)
    place = {"text": (SERVED, made.name, str(made))}
    process = SimpleNamespace(world=None, poll_apart=lambda: False)
    here = DataExchange(cfg, process, disks, peers)
    refusal = ConfigError("data.path", "nowhere", "no such file", "give one")
    folder = here._fetch("text", made.name, [{}, place, place], None, refusal)
    assert manifest_of(folder) == manifest_of(made)
    return peers.asked


def test_a_machine_that_falls_silent_is_replaced_by_another_one(machine):
    gone = OSError("rank 1 on b does not answer")
    assert set(fetched(machine, {1: gone})) == {1, 2}
    shutil.rmtree(machine / "cache0")
    with pytest.raises(SpotforgeError, match="cannot be fetched: rank 1 on b does not answer"):
        fetched(machine, {1: gone, 2: gone})
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConfigError, match="data.cache_dir=.*the disk is full"):
        fetched(machine, {1: full})
    assert not [p for p in (machine / "cache0").iterdir() if p.is_dir()]


def test_a_machine_whose_copy_is_damaged_is_replaced_by_another_one(machine):
    damaged = DamagedError("data", "train-00000.bin", "does not match its SHA-256", "delete it")
    gone = OSError("rank 2 on c does not answer")
    assert set(fetched(machine, {1: damaged})) == {1, 2}
    shutil.rmtree(machine / "cache0")
    with pytest.raises(DamagedError):
        fetched(machine, {1: damaged, 2: gone})
    assert not [p for p in (machine / "cache0").iterdir() if p.is_dir()]


def test_a_source_that_the_first_machine_lacks_is_said_to_be_missing(tmp_path):
    told = [{"data.sources.a": "1"}, {"data.sources.a": "1", "data.sources.b": "2"}]
    world = SimpleNamespace(gather=lambda _: told, together=contextlib.nullcontext)
    process, disks = SimpleNamespace(world=world), Disks(0, (0, 1), ("a", "b"))
    with pytest.raises(ConfigError, match="there is none on rank 0") as error:
        DataExchange(settings(tmp_path), process, disks, None)._check_same(told[0])
    assert error.value.key == "data.sources.b" and "None" not in str(error.value)


@pytest.mark.parametrize(
    ("folder", "share"),
    [("cache/0b1e6d636fd12b1e", (1, 2)), ("tokens", (0, 1))],
)
def test_ranks_share_the_verification_of_their_own_disk(tmp_path, folder, share):
    """Rank 2 is alone on its machine, and shares the disk of the cache with rank 0."""
    world = SimpleNamespace(rank=2, local_rank=0, local_world_size=1)
    process = SimpleNamespace(world=world, poll_apart=None)
    disks = Disks(2, (0, 1, 0), ("a", "b", "c"))
    together = DataExchange(settings(tmp_path), process, disks, None)
    assert together.share_of(tmp_path / folder) == share


def train_apart(base, *changes):
    """Trains, on machines that share only the run directory."""
    with join_world() as world, StopSignal() as stop:
        machine = base / str(world.rank)
        words = [
            *LLAMA,
            "schedule=constant",
            *changes,
            f"data.cache_dir={machine / 'cache'}",
            f"run.dir={base / 'run'}",
        ]
        config = small_config(machine, "global_batch_size=8", *words)
        return train_in(world, config, stop, Heartbeat())


@pytest.mark.long
def test_a_run_goes_on_on_machines_that_never_had_its_sources(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    write_sources(tmp_path / "0")
    finished = [ExitCode.FINISHED] * 2
    assert run_distributed(train_apart, 2, tmp_path, "stop.steps=8", apart=True) == finished
    digest = json.loads((tmp_path / "run" / "data.json").read_text())["digest"]
    for folder in ("0/essays", "0/notes", "0/cache"):
        shutil.rmtree(tmp_path / folder)
    (tmp_path / "0").rename(tmp_path / "lost")
    (tmp_path / "0").mkdir()
    assert run_distributed(train_apart, 2, tmp_path, "stop.steps=10", apart=True) == finished
    assert json.loads((tmp_path / "run" / "data.json").read_text())["digest"] == digest
