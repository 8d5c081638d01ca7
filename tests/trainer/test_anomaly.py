"""Losses that should not be learned from: skipped or rolled back from, alike in every strategy."""

import json
import math
import os
import signal

import pytest
import torch

from core.errors import ExitCode
from parallel.config import DdpConfig, FsdpConfig, ZeroConfig
from parallel.ddp import DdpStrategy
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.small_run import SmallRun
from trainer.anomaly import AnomalyAction, AnomalyConfig, LossWatch
from trainer.checkpoint import committed
from trainer.loop import TrainingLoop

STRATEGIES = {
    "ddp": DdpConfig(),
    "fsdp": FsdpConfig(),
    "zero1": ZeroConfig(stage=1),
    "zero2": ZeroConfig(stage=2),
    "zero3": ZeroConfig(stage=3),
    "zero2_offload": ZeroConfig(stage=2, offload_optimizer=True),
}


def watch(loss_spike=None):
    return LossWatch(AnomalyConfig(action=AnomalyAction.skip, loss_spike=loss_spike))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number(loss):
    assert "the loss is" in watch().verdict(loss)


def test_a_leap_is_told_from_noise_and_from_the_fall_at_the_start():
    judge = watch(loss_spike=10)
    losses = [8 * math.exp(-step / 50) + 2 + 0.05 * math.sin(step * 7) for step in range(300)]
    assert [judge.verdict(loss) for loss in losses] == [None] * 300
    assert "spiked to 5" in judge.verdict(5.0)
    assert judge.verdict(losses[-1]) is None, "the leap itself is not remembered"
    assert watch().verdict(1e9) is None, "only asked for"


def train_poisoned(names, poisoned):
    """{name: losses, norms, losses of a run that never saw the batch}"""
    results = {}
    with join_world() as world:
        for name in names:
            run = SmallRun(STRATEGIES[name], world)
            poison(run, poisoned)
            losses = [loss for loss, _ in run.train(6)]
            clean = SmallRun(STRATEGIES[name], world)
            expected = clean.train(poisoned)
            clean.step += 1
            expected += clean.train(5 - poisoned)
            results[name] = losses, run.norms, [loss for loss, _ in expected]
    return results


def poison(run, poisoned):
    """Spoils the gradient of one step, in the last micro-batch, after others were accumulated."""
    backward, step, run.norms = run.strategy.backward, run.strategy.step, []
    calls = []

    def spoil(loss):
        calls.append(run.step)
        bad = run.step == poisoned and calls.count(poisoned) == 2
        backward(loss * (math.nan if bad else 1))

    def careful(max_norm):
        norm = step(max_norm, skip_not_finite=True)
        run.norms.append(norm.item())
        return norm

    run.strategy.backward, run.strategy.step = spoil, careful


def test_a_gradient_that_is_no_number_changes_nothing():
    """Batches 0 1 [2] 3 4 5: from 3 on as if 2 had never been."""
    for name, (losses, norms, expected) in run_distributed(train_poisoned, 2, list(STRATEGIES), 2)[
        0
    ].items():
        assert [math.isfinite(norm) for norm in norms] == [True, True, False] + [True] * 3, name
        assert losses[:2] + losses[3:] == pytest.approx(expected, abs=1e-6), name


def records(run_dir, name="metrics"):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def spoilt(monkeypatch):
    """Makes the loss of chosen samples NaN, wherever they are read."""

    def spoil(*first_samples):
        train_step = TrainingLoop._train_step

        def spoilt_step(self, batches, num_targets, step):
            mine = {sample for batch in batches for sample in batch.sample_ids}
            if not mine & set(first_samples):
                return train_step(self, batches, num_targets, step)
            forward = self.strategy.forward
            self.strategy.forward = lambda **inputs: forward(**inputs) * math.nan
            try:
                return train_step(self, batches, num_targets, step)
            finally:
                del self.strategy.forward

        monkeypatch.setattr(TrainingLoop, "_train_step", spoilt_step)

    return spoil


def test_stop_is_the_default_and_keeps_the_good_checkpoint(trainer, small, tmp_path, spoilt):
    spoilt(24)  # the fourth step's first sample
    result = trainer(*small, "checkpoint.interval=2", "stop.steps=8")
    assert result.code == 1
    said = result.err.splitlines()
    assert "step 4: the loss is nan; step-00000002 was saved before" in said[-1]
    assert not any("Traceback" in line for line in said)
    assert [p.name for p in committed(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    assert records(tmp_path / "run", "events")[-1]["event"] == "fail"


def test_a_loss_that_is_not_logged_is_not_saved_either(trainer, small, tmp_path, spoilt):
    spoilt(24)
    result = trainer(*small, "checkpoint.interval=4", "log.every_steps=100", "stop.steps=8")
    assert result.code == 1 and "step 4: the loss is nan; nothing was saved" in result.err
    assert not committed(tmp_path / "run" / "checkpoints")


def test_a_gradient_that_is_no_number_is_not_saved(trainer, small, tmp_path, monkeypatch):
    monkeypatch.setattr(DdpStrategy, "step", lambda *_, **__: torch.tensor(math.nan))
    result = trainer(*small, "checkpoint.interval=2", "log.every_steps=100", "stop.steps=4")
    assert result.code == 1 and "step 2: the gradient norm is nan" in result.err
    assert not committed(tmp_path / "run" / "checkpoints")


def test_skip_goes_on_with_the_next_batch(trainer, small, tmp_path, spoilt):
    spoilt(24)
    result = trainer(*small, "anomaly.action=skip", "stop.steps=8", "checkpoint.interval=1")
    assert result.code == 0, result
    assert "step 4: the loss is nan; skipping its batch" in result.out
    run_dir = tmp_path / "run"
    assert [r["step"] for r in records(run_dir)] == list(range(1, 9))
    assert all(isinstance(r["loss"], float) for r in records(run_dir))
    [skip] = [e for e in records(run_dir, "events") if e["event"] == "skip"]
    assert skip["step"] == 3 and skip["loss"] == "NaN"
    newest = committed(run_dir / "checkpoints")[0]
    state = json.loads((newest / "trainer.json").read_text())
    assert state["step"] == 8 and state["num_samples"] == 9 * 8, "one batch was read for nothing"


def test_a_stop_behind_a_skipped_batch_saves_the_step_before(
    trainer, small, tmp_path, spoilt, monkeypatch
):
    spoilt(24)
    recover = TrainingLoop._recover

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return recover(*args)

    monkeypatch.setattr(TrainingLoop, "_recover", stopped)
    result = trainer(*small, "anomaly.action=skip", "stop.steps=8", "checkpoint.interval=end")
    assert result.code == ExitCode.START_AGAIN, result
    [checkpoint] = committed(tmp_path / "run" / "checkpoints")
    state = json.loads((checkpoint / "trainer.json").read_text())
    assert (state["step"], state["num_samples"]) == (3, 4 * 8)


def test_rollback_restores_and_goes_on_behind_the_batch(trainer, small, tmp_path, spoilt):
    spoilt(40)  # the sixth step's first sample; step 4 is saved
    arguments = ["checkpoint.interval=4", "stop.steps=8", "anomaly.action=rollback"]
    result = trainer(*small, *arguments)
    assert result.code == 0, result
    assert "rolling back to step-00000004" in result.out
    run_dir = tmp_path / "run"
    assert [r["step"] for r in records(run_dir)] == list(range(1, 9))
    [rollback] = [e for e in records(run_dir, "events") if e["event"] == "rollback"]
    assert (rollback["step"], rollback["to_step"]) == (5, 4)
    # The same weights, going on at sample 48, are what a run that starts there from step 4 has.
    state = json.loads((run_dir / "checkpoints" / "step-00000008" / "trainer.json").read_text())
    assert state["num_samples"] == 48 + 4 * 8


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(trainer, small, spoilt):
    spoilt(8)
    result = trainer(*small, "checkpoint.interval=end", "anomaly.action=rollback")
    assert result.code == 1 and "no checkpoint to roll back to" in result.err


def test_too_many_in_a_row_end_the_run(trainer, small, spoilt):
    spoilt(8, 16, 24, 32)
    result = trainer(*small, "anomaly.action=skip", "anomaly.max_in_a_row=2")
    assert result.code == 1 and "3 in a row" in result.err
