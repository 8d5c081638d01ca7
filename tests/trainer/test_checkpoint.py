"""Checkpoints on disk: committed whole, verified, named when damaged, safe from a full disk."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from core.errors import DamagedError
from parallel.config import DdpConfig, FsdpConfig
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.small_run import SmallRun, saved_to
from trainer.checkpoint import TrainerState, committed, read_state, verify
from trainer.checkpointer import Checkpointer
from trainer.config import CheckpointConfig


def no_assets(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def tell_nobody(event, step, **details):
    pass


def a_state(step):
    return TrainerState(step, step * 16, step * 512, 1.5, "data", "tokenizer", {"seed": 3})


def save_many(folder, keep_last):
    with join_world() as world:
        run = SmallRun(DdpConfig(), world)
        config = CheckpointConfig(keep_last=keep_last)
        checkpointer = Checkpointer(config, *saved_to(folder, world), no_assets, tell_nobody)
        for step in (1, 2, 3, 4):
            checkpointer.save(run.strategy.state, a_state(step))
        checkpointer.wait()
        checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_distributed(save_many, 2, folder, 3)
    return folder


def test_keeps_the_last_and_points_to_the_newest(saved):
    assert [p.name for p in committed(saved)] == [f"step-{i:08d}" for i in (4, 3, 2)]
    assert (saved / "LATEST").read_text() == "step-00000004\n"
    others = {p.name for p in saved.iterdir()} - {p.name for p in committed(saved)}
    assert others == {"GENERATION", "LATEST"}, "something was left behind"
    assert dataclasses.asdict(read_state(committed(saved)[0])) == dataclasses.asdict(a_state(4))


def test_manifest_lists_every_file(saved):
    newest = committed(saved)[0]
    listed = set(json.loads((newest / "manifest.json").read_text())["files"])
    there = {str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file()}
    assert listed == there - {"manifest.json"}
    assert {"__0_0.distcp", "__1_0.distcp"} <= listed, "every rank writes its share"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_named(saved, tmp_path, damage):
    import shutil

    checkpoint = tmp_path / "step-00000004"
    shutil.copytree(saved / "step-00000004", checkpoint)
    victim = checkpoint / ("manifest.json" if damage == "manifest" else "__1_0.distcp")
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        victim.unlink()
    with pytest.raises(DamagedError, match=victim.name):
        verify(checkpoint)


def fail_to_save(folder: Path):
    """The disk fills up under a second checkpoint."""
    with join_world() as world:
        run = SmallRun(FsdpConfig(), world)
        storage = saved_to(folder, world)
        checkpointer = Checkpointer(CheckpointConfig(), *storage, no_assets, tell_nobody)
        checkpointer.save(run.strategy.state, a_state(1))
        checkpointer.wait()
        import errno
        from unittest.mock import patch

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        # On one rank only; the others must hear of it.
        target = "torch.distributed.checkpoint.filesystem._write_item"
        with patch(
            target,
            full
            if world.rank == 1
            else __import__(
                "torch.distributed.checkpoint.filesystem", fromlist=["_write_item"]
            )._write_item,
        ):
            checkpointer.save(run.strategy.state, a_state(2))
            try:
                checkpointer.wait()
            except Exception as e:
                message = f"{type(e).__name__}: {e}"
            else:
                message = "saved"
        checkpointer.close()
        return message


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    for message in run_distributed(fail_to_save, 2, folder):
        assert message.startswith("ConfigError: run.dir=")
        assert "No space left" in message and "step-00000001 is complete" in message
    assert [p.name for p in committed(folder)] == ["step-00000001"]
    assert not list(folder.glob(".staging*"))
    verify(folder / "step-00000001")
