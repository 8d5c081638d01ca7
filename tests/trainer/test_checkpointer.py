"""What the checkpoint folder and the object store hold as a run goes, and where a resume looks."""

import errno
import json
import os
import shutil
import time

import fsspec
import pytest

from monitoring.metrics import MetricLogger
from tests.object_store import ObjectStore
from trainer.checkpoint import committed, outdated
from trainer.reporter import Reporter, save_costs_s


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder behind `double://bucket`."""
    folder = tmp_path / "store"
    folder.mkdir()
    monkeypatch.setenv("OBJECT_STORE_FOLDER", str(folder))
    monkeypatch.setattr("trainer.store._BACKOFF_S", 0.001)
    fsspec.register_implementation("double", ObjectStore, clobber=True)
    return folder


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


UPLOAD = "checkpoint.upload=double://bucket/run"


def events(run_dir, *kinds):
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if not kinds or e["event"] in kinds]


def losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines)]


def names(run_dir):
    return [int(path.name.removeprefix("step-")) for path in committed(run_dir / "checkpoints")]


def remote_names():
    from trainer.remote import RemoteCheckpoints

    return RemoteCheckpoints("double://bucket/run").names()


def test_outdated():
    steps = [f"step-{n:08d}" for n in (100, 150, 200, 250, 300)]
    assert outdated(steps, 2, None) == steps[2::-1]
    assert outdated(steps, 2, 100) == [steps[1]]
    assert outdated(steps, 9, None) == []


def test_keeps_the_last_and_every_so_manyth(trainer, small, run_dir):
    keep = ["checkpoint.keep_last=2", "checkpoint.keep_every=4"]
    assert trainer(*small, "checkpoint.interval=1", "stop.steps=11", *keep).code == 0
    assert names(run_dir) == [11, 10, 8, 4]


def test_every_save_says_what_it_cost(trainer, small, run_dir):
    began_s = time.monotonic()
    assert trainer(*small, "checkpoint.interval=2").code == 0
    took_s = time.monotonic() - began_s
    saves = events(run_dir, "checkpoint")
    assert [save["step"] for save in saves] == [2, 4, 6]
    assert sum(save["blocking_s"] for save in saves) < took_s
    assert save_costs_s(run_dir) == [save["blocking_s"] for save in saves]
    for save in saves:
        assert save["blocking_s"] >= 0 and 0 < save["write_s"] < took_s
        folder = run_dir / "checkpoints" / f"step-{save['step']:08d}"
        if folder.exists():
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            assert save["size_bytes"] == size - (folder / "manifest.json").stat().st_size


def test_a_damaged_newer_checkpoint_pushes_out_no_good_one(trainer, small, run_dir):
    more = [*small, "checkpoint.interval=2", "checkpoint.keep_last=2", "stop.steps=6"]
    assert trainer(*more).code == 0 and names(run_dir) == [6, 4]
    (run_dir / "checkpoints" / "step-00000006" / ".metadata").unlink()
    result = trainer(*more, "checkpoint.keep_last=1", "stop.steps=5", "allow_changes=[stop.steps]")
    assert result.code == 0 and "step-00000006 is set aside" in result.out
    assert names(run_dir) == [5], "the one that was just saved"
    [passed] = events(run_dir, "passed_over")
    assert passed["checkpoint"] == "step-00000006" and ".metadata is missing" in passed["reason"]


def test_going_back_to_an_older_checkpoint_sticks(trainer, small, run_dir):
    more = [*small, "checkpoint.interval=2", "checkpoint.keep_last=9"]
    assert trainer(*more).code == 0 and names(run_dir) == [6, 4, 2]
    before = losses(run_dir)
    older = run_dir / "checkpoints" / "step-00000002"
    result = trainer(*more, f"resume={older}")
    assert result.code == 0 and "resuming after step 2" in result.out
    assert losses(run_dir) == before
    assert "resuming after step 6" in trainer(*more).out


def test_a_disk_that_fills_up_elsewhere_is_said_in_one_line(trainer, small, run_dir, monkeypatch):
    def full(*given):
        if given[-1] != "running":  # what is written as the run begins
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Reporter, "log", full)
    monkeypatch.setattr(MetricLogger, "_write_status", full)
    result = trainer(*small)
    assert result.code == 2
    [line] = [line for line in result.err.splitlines() if not line.startswith("preparing data")]
    assert line.startswith(f"run.dir={run_dir}: the disk is full") and "free some space" in line


def test_what_a_killed_save_left_is_removed_and_never_read(trainer, small, run_dir):
    more = [*small, "checkpoint.interval=2"]
    assert trainer(*more).code == 0
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step-00000006", folder / ".staging-step-00000008")
    result = trainer(*more)
    assert result.code == 0 and "resuming after step 6" in result.out
    assert not list(folder.glob(".staging*"))


def test_uploads_follow_and_a_new_machine_resumes_from_them(trainer, small, run_dir, store):
    more = [*small, UPLOAD, "checkpoint.interval=2", "stop.steps=6", "schedule=constant"]
    assert trainer(*more).code == 0
    assert remote_names()[0] == "step-00000006" and len(remote_names()) <= 2
    assert events(run_dir, "upload")[-1]["step"] == 6
    shutil.rmtree(run_dir)  # another machine
    result = trainer(*more, "stop.steps=8")
    assert result.code == 0, result
    assert "fetching step-00000006" in result.out and "resuming after step 6" in result.out
    assert [step for step, _ in losses(run_dir)] == [1, 2, 3, 4, 5, 6, 7, 8]
    whole = [*more, "stop.steps=8", f"run.dir={run_dir}-whole", "checkpoint.upload=null"]
    assert trainer(*whole).code == 0
    assert losses(run_dir) == losses(run_dir.with_name("run-whole"))


def test_a_damaged_upload_is_passed_over(trainer, small, run_dir, store):
    from tests import object_store

    more = [*small, UPLOAD, "checkpoint.interval=3", "checkpoint.asynchronous=false"]
    assert trainer(*more, "stop.steps=3", "schedule=constant").code == 0
    assert trainer(*more, "stop.steps=6", "schedule=constant").code == 0
    assert remote_names() == ["step-00000006", "step-00000003"]
    object_store.damage("bucket/run/step-00000006/generation-2/__0_0.distcp", b"rubbish")
    shutil.rmtree(run_dir)
    result = trainer(*more, "stop.steps=6", "schedule=constant")
    assert result.code == 0 and "passed over" in result.out and "after step 3" in result.out


def test_what_is_damaged_here_is_fetched_from_the_store(trainer, small, run_dir, store):
    more = [*small, UPLOAD, "checkpoint.interval=3", "schedule=constant"]
    assert trainer(*more, "stop.steps=6").code == 0
    shard = run_dir / "checkpoints" / "step-00000006" / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    result = trainer(*more, "stop.steps=8")
    assert result.code == 0 and "passed over" in result.out
    assert "fetching step-00000006" in result.out and "resuming after step 6" in result.out
    assert [step for step, _ in losses(run_dir)] == list(range(1, 9))
    assert shard.read_bytes() == content


def test_of_two_starts_of_one_run_the_second_goes_on(
    trainer, small, run_dir, store, monkeypatch, tmp_path
):
    """On two machines with a disk each: only the bucket tells them of each other."""
    from trainer.remote import RemoteCheckpoints

    more = [*small, UPLOAD, "checkpoint.interval=2", "schedule=constant"]
    keep, taken_over = Reporter.keep, []

    def take_over(reporter, record):
        keep(reporter, record)
        if record["step"] == 3:
            other = RemoteCheckpoints("double://bucket/run")
            other.claim(other.generation() + 1)
            taken_over.append(other.names())

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "keep", take_over)
        first = trainer(*more)
    assert first.code == 2
    [line] = [line for line in first.err.splitlines() if "has taken over" in line]
    assert line.startswith("checkpoint.upload=double://bucket/run: step-0000000")
    assert "of generation 1 is not" in line and "generation 2 (host " in line
    assert remote_names() in ([], taken_over[0])
    assert trainer(*more, f"run.dir={tmp_path / 'second'}").code == 0
    assert remote_names()[0] == "step-00000006"
    manifest = RemoteCheckpoints("double://bucket/run").manifest("step-00000006")
    assert manifest.generation == json.loads(manifest.content)["generation"] == 3


def test_what_an_older_start_uploads_meanwhile_is_not_passed_over(
    trainer, small, store, monkeypatch, tmp_path
):
    from tests.trainer.uploads import a_checkpoint, of_start, send
    from trainer.finder import CheckpointFinder
    from trainer.remote import RemoteCheckpoints

    find = CheckpointFinder.find

    def find_early(*given):
        found = find(*given)
        older = RemoteCheckpoints("double://bucket/run")
        older.claim(1)
        send(older, a_checkpoint(tmp_path, 4, of_start(1), 1))
        return found

    monkeypatch.setattr(CheckpointFinder, "find", find_early)
    result = trainer(*small, UPLOAD, "schedule=constant")
    assert result.code == 1 and "has uploaded step-00000004 meanwhile; start again" in result.err


def test_a_store_that_refuses_is_refused_at_the_start(trainer, small, run_dir, store, monkeypatch):
    monkeypatch.setenv("OBJECT_STORE_FAULTS", "refuse=1")
    result = trainer(*small, UPLOAD)
    assert result.code == 2 and "checkpoint.upload=double://bucket/run" in result.err
    assert not run_dir.exists()


def test_an_upload_that_fails_is_said_and_costs_no_training(
    trainer, small, run_dir, store, monkeypatch
):
    monkeypatch.setenv("OBJECT_STORE_FAULTS", "fail_after=4")
    monkeypatch.setattr("trainer.uploader._PATIENCE_S", 0)
    ObjectStore.num_puts = 0
    result = trainer(*small, UPLOAD, "checkpoint.interval=end")
    assert result.code == 1 and "was not uploaded" in result.err
    assert [step for step, _ in losses(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert names(run_dir) == [6] and remote_names() == []
    assert [e["event"] for e in events(run_dir)][-2:] == ["upload_failed", "fail"]
