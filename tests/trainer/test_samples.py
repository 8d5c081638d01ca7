"""Samples in the order of the uninterrupted run, whatever interrupts a run and where it goes on."""

import hashlib
import os
import signal
from unittest.mock import patch

import pytest
import torch

from core.errors import ExitCode
from monitoring.events import read_events
from monitoring.jsonl import read_records
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.trainer.small_config import LLAMA, parallel, small_config, write_sources
from trainer.data.batch import PADDING
from trainer.data.loader import TrainLoader
from trainer.data.prepare import prepare
from trainer.heartbeat import Heartbeat
from trainer.loop import TrainingLoop
from trainer.run import train_in
from trainer.stopping import StopSignal

STEPS = 14
# Strategy, ranks, and which rank gets SIGTERM in which step: the last one goes on to the end.
PARTS = [("ddp", 4, 2, 3), ("fsdp", 2, 1, 7), ("zero2", 1, 0, 10), ("fsdp", 3, None, None)]
# Shared evenly by all of them; by none of 3 and 4; and less than a row for each of 4.
GLOBAL_BATCH_SIZES = [12, 10, 3]


def train_and_record(jobs):
    """On every rank: trains what `jobs` says, one after another.

    Args:
        jobs: (configuration, rank that is told to stop, step in which it is).

    Returns:
        Of each job, the exit code, and what this rank has trained on, in that order: (step, sample
        id, digest of tokens, targets and positions, documents in it).
    """
    runs = []
    with join_world() as world:
        for config, rank, step in jobs:
            seen = []
            with (
                StopSignal() as stop,
                patch.object(
                    TrainingLoop,
                    "_train_step",
                    recording(seen, step if rank == world.rank else None),
                ),
            ):
                runs.append((train_in(world, config, stop, Heartbeat()), seen))
    return runs


def recording(seen, stop_in_step):
    """`TrainingLoop._train_step` that notes what it is given: batches read ahead do not count."""
    train_step = TrainingLoop._train_step

    def recorded(loop, batches, num_targets, steps_done):
        for batch in batches:
            columns = torch.stack([batch.input_ids, batch.targets, batch.position_ids], 1)
            for sample_id, row in zip(batch.sample_ids, columns, strict=True):
                if sample_id != PADDING:
                    digest = hashlib.sha256(row.numpy().tobytes()).hexdigest()
                    num_documents = int((row[2] == 0).sum())
                    seen.append((steps_done + 1, sample_id, digest, num_documents))
        result = train_step(loop, batches, num_targets, steps_done)
        if steps_done + 1 == stop_in_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    return recorded


def config(folder, name, global_batch_size, strategy, ranks):
    return small_config(
        folder,
        *LLAMA,
        *parallel(strategy, ranks),
        f"global_batch_size={global_batch_size}",
        f"stop.steps={STEPS}",
        "checkpoint.interval=end",
        f"run.dir={folder / name}",
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: (run directory, exit codes, samples in the order of steps and ids)}.

    `whole-<global batch size>` is uninterrupted, on one rank; `parts-...` goes through PARTS.
    """
    folder = tmp_path_factory.mktemp("samples")
    write_sources(folder)
    codes, samples = {}, {}
    for strategy, ranks, stopped_rank, stop_in_step in PARTS:
        jobs = {
            f"parts-{g}": (
                config(folder, f"parts-{g}", g, strategy, ranks),
                stopped_rank,
                stop_in_step,
            )
            for g in GLOBAL_BATCH_SIZES
        }
        if ranks == 1:
            for g in GLOBAL_BATCH_SIZES:
                jobs[f"whole-{g}"] = (config(folder, f"whole-{g}", g, "ddp", 1), None, None)
        for done in run_distributed(train_and_record, ranks, list(jobs.values())):
            for name, (code, seen) in zip(jobs, done, strict=True):
                codes.setdefault(name, []).append(code)
                samples.setdefault(name, []).extend(seen)
    return {name: (folder / name, codes[name], sorted(samples[name])) for name in codes}


@pytest.mark.long
@pytest.mark.parametrize("global_batch_size", GLOBAL_BATCH_SIZES)
def test_interrupted_runs_see_the_samples_of_an_uninterrupted_one(runs, global_batch_size):
    whole_dir, codes, whole = runs[f"whole-{global_batch_size}"]
    assert codes == [ExitCode.FINISHED]
    assert [i for _, i, _, _ in whole] == list(range(STEPS * global_batch_size))
    documents = [n for _, _, _, n in whole]
    assert min(documents) == 1 and max(documents) > 2, "samples of both sources, one of them packed"

    parts_dir, codes, parts = runs[f"parts-{global_batch_size}"]
    assert codes == [
        *[ExitCode.START_AGAIN] * (4 + 2 + 1),  # every rank of every part but the last
        *[ExitCode.FINISHED] * 3,
    ]
    stops = [(e["step"], e["reason"]) for e in read_events(parts_dir) if e["event"] == "stop"]
    assert stops == [(3, "SIGTERM"), (7, "SIGTERM"), (10, "SIGTERM")]
    assert parts == whole, "a sample was lost, repeated, moved or changed"


@pytest.mark.long
@pytest.mark.parametrize("global_batch_size", GLOBAL_BATCH_SIZES)
def test_no_step_is_lost_or_repeated(runs, global_batch_size):
    whole, parts = (
        read_records(runs[f"{name}-{global_batch_size}"][0] / "metrics.jsonl")
        for name in ("whole", "parts")
    )
    assert [r["step"] for r in parts] == [r["step"] for r in whole] == list(range(1, STEPS + 1))
    assert [r["step"] for r in parts if r.get("resumed")] == [4, 8, 11]
    for expected, found in zip(whole, parts, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5), found["step"]
        assert found["lr"] == expected["lr"] and found["num_tokens"] == expected["num_tokens"]


def test_resuming_at_sample_ten_million(tmp_path):
    write_sources(tmp_path)
    settings = config(tmp_path, "far", 12, "ddp", 1)
    data = prepare(settings.data, model_path=None, stop_requested=lambda: False)

    def first_steps(first_sample, count):
        with TrainLoader(
            data,
            max_seq_len=settings.data.max_seq_len,
            mask_documents=True,
            seed=0,
            global_batch_size=12,
            micro_batch_size=2,
            rank=0,
            world_size=1,
            first_sample=first_sample,
            pin=False,
        ) as loader:
            return [next(loader) for _ in range(count)]

    [resumed] = first_steps(10_000_000, 1)
    _, passed = first_steps(10_000_000 - 12, 2)
    for ours, theirs in zip(resumed, passed, strict=True):
        assert ours.sample_ids == theirs.sample_ids
        assert torch.equal(ours.input_ids, theirs.input_ids)
    assert [i for batch in resumed for i in batch.sample_ids] == list(range(10_000_000, 10_000_012))
