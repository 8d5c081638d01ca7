"""Checkpoints of ranks that have disks of their own: whole without any disk that all see."""

import json
import shutil
from pathlib import Path

import pytest

from core.errors import ConfigError, DamagedError, SupersededError
from parallel.config import DdpConfig, FsdpConfig, ZeroConfig
from parallel.disks import find_disks
from parallel.peers import PeerFiles
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.small_run import SmallRun
from tests.trainer.test_checkpoint import a_state, no_assets
from trainer.checkpoint import committed, verify
from trainer.checkpointer import Checkpointer
from trainer.config import CheckpointConfig
from trainer.finder import CheckpointFinder
from trainer.remote import RemoteCheckpoints
from trainer.resume import load_checkpoint
from trainer.storage import CHECKPOINTS, Generation, Storage

STRATEGIES = {"ddp": DdpConfig, "fsdp": FsdpConfig, "zero": lambda: ZeroConfig(stage=1)}


class Said:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def event(self, event, step, **details):
        pass


def disk(root, name):
    """The run directory on the disk of a machine."""
    folder = Path(root) / str(name) / "run"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def machine(root, names, strategy, *, resumes=True, saves=True, replicas="auto", url=None):
    """One rank, which is a machine with the disk `names[rank]`: resumes, trains a step, saves.

    Returns:
        Step and losses after the resume, names of checkpoints here, what was said, or the error.
    """
    with join_world() as world:
        run_dir = disk(root, names[world.rank])
        (run_dir / "metrics.jsonl").touch()
        disks = find_disks(world, run_dir)
        folder = run_dir / "checkpoints"
        said = Said()
        try:
            with PeerFiles(world, disks, {CHECKPOINTS: folder}) as peers:
                remote = None if url is None else RemoteCheckpoints(url)
                storage = Storage(folder, world, disks, peers, remote)
                located = CheckpointFinder(storage, said).find("auto") if resumes else None
                run = SmallRun(STRATEGIES[strategy](), world)
                if located is not None:
                    run.step = int(located.folder.name.removeprefix("step-"))
                    load_checkpoint(located, run.strategy, run.step, world)
                first, losses = run.step, run.train(2)
                if saves:
                    config = CheckpointConfig(replicas=replicas)
                    generation = Generation.claim(storage, first)
                    checkpointer = Checkpointer(config, storage, generation, no_assets, tell)
                    checkpointer.save(run.strategy.state, a_state(run.step))
                    checkpointer.wait()
                    with world.together():  # the others upload meanwhile
                        assert checkpointer.wait_for_uploads(finished=True) is None
                    checkpointer.close()
        except (ConfigError, DamagedError) as e:
            return first_line(e), said.lines
        return first, losses, [p.name for p in committed(folder)], said.lines


def first_line(error):
    return f"{type(error).__name__}: {error}"


def tell(event, step, **details):
    pass


def go(root, names, strategy, **options):
    return run_distributed(_machine, len(names), str(root), names, strategy, options, apart=True)


def _machine(root, names, strategy, options):
    return machine(root, names, strategy, **options)


def files(root, name, step=2):
    folder = disk(root, name) / "checkpoints" / f"step-{step:08d}"
    return sorted(p.name for p in folder.glob("__*"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two machines that saved step 2 under FSDP, each with a copy of the other's files."""
    root = tmp_path_factory.mktemp("saved")
    return root, go(root, "ab", "fsdp")


@pytest.fixture
def disks(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "disks")
    return tmp_path / "disks"


def without_copies(root):
    """Takes the copies of the other machine's files away."""
    for name, other in (("a", "1"), ("b", "0")):
        for path in (disk(root, name) / "checkpoints").glob(f"step-*/__{other}_*"):
            path.unlink()


def test_each_disk_has_its_share_and_a_copy(saved, tmp_path):
    root, found = saved
    assert [f[0] for f in found] == [0, 0] and found[0][2] == found[1][2] == ["step-00000002"]
    for name in "ab":
        verify(disk(root, name) / "checkpoints/step-00000002")  # with the copy it is whole
    paths = [disk(root, name) / "checkpoints/step-00000002/manifest.json" for name in "ab"]
    (manifest,) = {path.read_text() for path in paths}
    assert json.loads(manifest)["generation"] == 1


def test_the_folders_of_all_machines_make_an_ordinary_checkpoint(disks, tmp_path):
    without_copies(disks)
    assert files(disks, "a") == ["__0_0.distcp"] and files(disks, "b") == ["__1_0.distcp"]
    both = tmp_path / "step-00000002"
    for name in "ab":
        shutil.copytree(disk(disks, name) / "checkpoints/step-00000002", both, dirs_exist_ok=True)
    verify(both)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "zero"])
def test_another_layout_reads_the_parts_that_are_elsewhere(disks, strategy):
    """Four machines, two of them new, under another strategy: the losses are the same."""
    without_copies(disks)
    found = go(disks, "cabf", strategy, saves=False)
    whole = go(disks, "d", "fsdp", resumes=False, saves=False)[0]
    assert [f[0] for f in found] == [2, 2, 2, 2]
    longer = go(disks, "e", "fsdp", resumes=False)[0]
    again = go(disks, "e", "fsdp", saves=False)[0]
    assert longer[1] == whole[1] and again[0] == 2
    for f in found:
        assert [loss for loss, _ in f[1]] == pytest.approx([loss for loss, _ in again[1]], rel=1e-5)
    assert files(disks, "c") == [], "what was fetched is not kept"
    assert not list(disk(disks, "c").rglob(".staging*"))


def test_a_copy_makes_up_for_a_lost_machine(disks):
    (found,) = go(disks, "b", "ddp", saves=False)
    assert found[0] == 2


def test_without_a_copy_a_lost_machine_is_named_and_nothing_starts_from_scratch(disks):
    without_copies(disks)
    for error, _ in go(disks, "bc", "ddp"):
        assert error.startswith("DamagedError") and "__0_0.distcp" in error
        assert "rank 0 wrote it" in error


@pytest.mark.long
def test_a_damaged_file_is_read_from_its_copy(disks):
    path = disk(disks, "a") / "checkpoints/step-00000002/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = go(disks, "ab", "ddp", saves=False)
    assert [f[0] for f in found] == [2, 2]
    assert any("__0_0.distcp" in line and "SHA-256" in line for line in found[0][3])


@pytest.mark.long
def test_what_the_store_has_is_read_from_there_by_ranges(saved, tmp_path):
    url = f"file://{tmp_path}/store"
    assert go(tmp_path, "ab", "fsdp", url=url, replicas="0")[0][0] == 0
    assert RemoteCheckpoints(url).names() == ["step-00000002"]
    shutil.rmtree(tmp_path / "a")
    found = go(tmp_path, "bc", "ddp", url=url, saves=False)
    assert [f[0] for f in found] == [2, 2]
    shutil.rmtree(tmp_path / "b")
    assert [f[0] for f in go(tmp_path, "de", "fsdp", url=url, saves=False)] == [2, 2]


def test_an_older_start_commits_nothing_more(tmp_path):
    with join_world() as world:
        folder = tmp_path / "run" / "checkpoints"
        disks = find_disks(world, folder)
        storage = Storage(folder, world, disks)
        older, newer = Generation.claim(storage, 0), Generation.claim(storage, 0)
        newer.check()
        run = SmallRun(DdpConfig(), world)
        checkpointer = Checkpointer(CheckpointConfig(), storage, older, no_assets, tell)
        checkpointer.save(run.strategy.state, a_state(1))
        with pytest.raises(SupersededError, match="generation 1 .* generation 2"):
            checkpointer.wait()
        checkpointer.close()
        assert committed(folder) == [] and not list(folder.glob(".staging*"))
