"""The training loop. It knows parallelism only as `Strategy`, and ranks only as `World`."""

import dataclasses
import hashlib
import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core import layout
from core.errors import DivergedError, ExitCode
from monitoring.throughput import Throughput
from parallel.strategy import Strategy
from trainer.anomaly import AnomalyAction, LossWatch
from trainer.checkpoint import TrainerState, committed, read_state
from trainer.checkpointer import Checkpointer
from trainer.config import TrainerConfig
from trainer.data.batch import Batch
from trainer.data.loader import TrainLoader
from trainer.data.prepare import PreparedData
from trainer.evaluation import evaluate, generate, held_out_batches, prompt_ids
from trainer.finder import CheckpointFinder
from trainer.interval import Interval, SaveSchedule, expected_mtbf_s
from trainer.objective import Objective
from trainer.process import Process
from trainer.reporter import Reporter, count_crashes, save_costs_s
from trainer.resume import load_checkpoint


class TrainingLoop:
    """Runs one optimizer step after another, starting from `state`.

    Raises:
        ConfigError: The data is too short for one sample to train on, or to validate with.
    """

    def __init__(
        self,
        config: TrainerConfig,
        process: Process,
        data: PreparedData,
        module: Objective,
        strategy: Strategy,
        checkpointer: Checkpointer,
        reporter: Reporter,
        state: TrainerState,
    ) -> None:
        self.config, self.process, self.world, self.data = config, process, process.world, data
        self.module, self.strategy = module, strategy
        self.checkpointer, self.reporter = checkpointer, reporter
        self.state = state
        assert state.order is not None, "the run sets it at its start or when it resumes"
        self.order = state.order
        self.checkpoints = config.run_dir / layout.CHECKPOINTS
        self.loss_watch = LossWatch(config.anomaly)
        self.judges_every_loss = config.anomaly.action is not AnomalyAction.stop
        self.anomalies_in_a_row = 0
        mtbf_s = expected_mtbf_s(
            config.checkpoint.mean_hours_between_preemptions * 3600,
            state.elapsed_s,
            count_crashes(config.run_dir),
        )
        self.save_schedule = SaveSchedule(
            Interval.parse(config.checkpoint.interval), mtbf_s, save_costs_s(config.run_dir)
        )
        held_out_batches(config, data, self.world, module.apart)  # raises now if there is no sample
        if config.evaluation.sample_prompt is not None:
            prompt_ids(config, data.tokenizer)  # raises now if the prompt has no tokens
        self.loader = self._loader(state.num_samples)

    def run(self) -> tuple[TrainerState, ExitCode]:
        """Trains until the run is finished or told to stop.

        Returns:
            Last state, whose checkpoint is committed, and FINISHED or START_AGAIN.

        Raises:
            ConfigError: A checkpoint could not be written; raised on every rank.
            DivergedError: A loss is not acceptable by `config.anomaly`; raised on every rank.
        """
        config, world, strategy, state = self.config, self.world, self.strategy, self.state
        total_steps = config.total_steps
        throughput = Throughput()
        # As if the run had never stopped, so that stop.minutes counts the time of all starts.
        began = time.monotonic() - state.elapsed_s
        saved_step = state.step if state.step else None
        blocked_s = 0.0
        trained: _Step | None = None  # the last step that was not skipped
        outcome = ExitCode.FINISHED
        try:
            if config.evaluation.at_start and state.step == 0:
                self._evaluate_and_log({"step": 0, "num_tokens": 0, "elapsed_s": state.elapsed_s})
            while total_steps is None or state.step < total_steps:
                self.process.heartbeat.at("train", state.step)
                # 1. This rank's micro-batches of the next global batch
                wait_began = time.perf_counter()
                batches = next(self.loader)
                data_wait_s = time.perf_counter() - wait_began

                # 2. All that ranks must agree on, in one small collective on the CPU
                num_targets, stop, time_up, save_failed, save_due = world.sum(
                    sum(batch.num_targets for batch in batches),
                    self.process.stop.requested(),
                    # Clocks of ranks differ, and all must leave the loop at the same step.
                    world.rank == 0 and self._time_is_up(began),
                    self.checkpointer.failed,
                    world.rank == 0 and self.save_schedule.due(state.step + 1),
                )
                if save_failed:
                    self.checkpointer.wait()  # raises the error on every rank
                if stop:
                    outcome = ExitCode.START_AGAIN
                # The batch at hand does not count as trained on, so a resume reads it again.
                if stop or time_up:
                    break

                # 3. Forward, backward, update
                lr = config.optim.lr * config.schedule.scale(state.step, total_steps)
                strategy.set_lr(lr)
                step = self._train_step(batches, num_targets, state.step)
                if step.anomaly is not None:
                    state = self._recover(step.anomaly, step.loss, state)
                    continue
                trained = step
                self.anomalies_in_a_row = 0
                num_tokens = config.global_batch_size * config.data.max_seq_len
                state = dataclasses.replace(
                    state,
                    step=state.step + 1,
                    num_samples=state.num_samples + config.global_batch_size,
                    num_tokens=state.num_tokens + num_tokens,
                    elapsed_s=time.monotonic() - began,
                )
                throughput.step(num_tokens, data_wait_s)

                # 4. Periodically: metrics (the only place that waits for the device), a checkpoint,
                #    validation. The save comes first, so that no later failure loses the step.
                last = state.step == total_steps
                saves = last or save_due
                evaluates = last or _due(state.step, config.evaluation.every_steps)
                logs = evaluates or _due(state.step, config.log.every_steps)
                if logs or saves:
                    step.all_reduce()
                    self._refuse_divergence(step, state)
                record: dict[str, Any] | None = None
                if logs:
                    record = {
                        "step": state.step,
                        **step.means,
                        "grad_norm": step.grad_norm.item(),
                        "lr": lr,
                        "num_tokens": state.num_tokens,
                        **throughput.window(),
                        "checkpoint_blocking_s": blocked_s,
                        "elapsed_s": state.elapsed_s,
                    }
                    blocked_s = 0.0
                else:
                    self.reporter.progress(state.step)
                if record is None and not saves:
                    continue
                # Saves and evaluations would make steps look slow.
                with throughput.paused():
                    if saves:
                        blocked_s += self._save(state, record)
                        saved_step = state.step
                    # The run's last step is safe, whatever happens in its last evaluation.
                    if last:
                        self.checkpointer.wait()
                    if record is not None and evaluates:
                        self._evaluate_and_log(record)
                    elif record is not None:
                        self.reporter.log(record)
        finally:
            self.loader.close()
        # A stop or the end of the time may come between two saves.
        if saved_step != state.step:
            if trained is not None:
                trained.all_reduce()
                self._refuse_divergence(trained, state)
            self._save(state)
        self.checkpointer.wait()
        return state, outcome

    def _train_step(self, batches: list[Batch], num_targets: float, step: int) -> "_Step":
        """Runs one update, or skips it for an anomaly.

        The loss is summed, then divided by the global count, so every split of a global batch gives
        the same gradient.
        """
        config, world, strategy = self.config, self.world, self.strategy
        result = _Step(num_targets)
        torch.manual_seed(_step_seed(config.seed, step, world.rank))  # for dropout
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            on_device = batch.to(world.device)
            with strategy.accumulate(last=last):
                loss_sum = strategy.forward(**on_device.inputs())
                result.add({"loss": loss_sum.detach(), **self.module.parts})
                if last and self.judges_every_loss:
                    result.all_reduce()
                    result.anomaly = self.loss_watch.verdict(result.loss)
                # Every strategy discards a gradient that is not finite. NaN is the one way to take
                # back micro-batches that were already accumulated or reduced.
                strategy.backward(loss_sum / (math.nan if result.anomaly else num_targets))
        norm = strategy.step(config.optim.max_norm, skip_not_finite=self.judges_every_loss)
        result.grad_norm = norm
        if self.judges_every_loss and not result.anomaly and not math.isfinite(norm.item()):
            result.anomaly = f"the gradient norm is {norm.item()}"
        return result

    def _recover(self, anomaly: str, loss: float, state: TrainerState) -> TrainerState:
        """Returns the state to continue from after a batch was skipped; the same on every rank.

        The batch is never read again: after a rollback the run continues with the batches after it.
        """
        self.anomalies_in_a_row += 1
        if self.anomalies_in_a_row > self.config.anomaly.max_in_a_row:
            raise self._diverged(state, f"{anomaly}, {self.anomalies_in_a_row} in a row")
        num_samples = state.num_samples + self.config.global_batch_size
        what = f"step {state.step + 1}: {anomaly}"
        if self.config.anomaly.action is AnomalyAction.skip:
            self.reporter.say(f"{what}; skipping its batch")
            self.reporter.event("skip", state.step, loss=loss, reason=anomaly)
            return dataclasses.replace(state, num_samples=num_samples)
        self.process.heartbeat.at("load", state.step)
        self.checkpointer.wait()
        # `resume` may name the checkpoint that this run began from, and there may be newer ones.
        finder = CheckpointFinder(self.checkpointer.for_rollback, self.reporter)
        located = finder.find("auto")
        finder.record_passed_over()
        if located is None:
            raise self._diverged(state, f"{anomaly}, and there is no checkpoint to roll back to")
        saved = read_state(located.folder)
        name = located.folder.name
        self.reporter.say(f"{what}; rolling back to {name}, then using later batches")
        self.reporter.event("rollback", state.step, to_step=saved.step, loss=loss, reason=anomaly)
        self.reporter.roll_back(saved.step)
        load_checkpoint(located, self.strategy, saved.step, self.world)
        self.loader.close()
        self.loader = self._loader(num_samples)
        # The data and the clock move on; everything else is as it was saved.
        return dataclasses.replace(
            saved,
            num_samples=num_samples,
            elapsed_s=state.elapsed_s,
            config=state.config,
            order=state.order,
        )

    def _refuse_divergence(self, step: "_Step", state: TrainerState) -> None:
        for name, value in (("loss", step.loss), ("gradient norm", step.grad_norm.item())):
            if not math.isfinite(value):
                raise self._diverged(state, f"the {name} is {value}")

    def _diverged(self, state: TrainerState, what: str) -> DivergedError:
        self.checkpointer.wait()
        good = committed(self.checkpoints)
        kept = f"{good[0].name} was saved before" if good else "nothing was saved before"
        return DivergedError(
            f"step {state.step}: {what}; {kept}. Lower optim.lr or optim.max_norm, check the data"
            ", or set anomaly.action=skip or rollback"
        )

    def _save(self, state: TrainerState, record: dict[str, Any] | None = None) -> float:
        """Saves and returns the seconds it took from training."""
        self.process.heartbeat.at("save", state.step)
        # A copy, since validation metrics are added to the record meanwhile.
        known = None if record is None else dict(record)
        blocked_s = self.checkpointer.save(self.strategy.state, state, known)
        self.save_schedule.saved(blocked_s)
        return blocked_s

    def _evaluate_and_log(self, record: dict[str, Any]) -> None:
        """Logs a step with its validation metrics, or without them if the evaluation fails."""
        try:
            metrics = self._evaluate(record["step"])
        except Exception as e:
            self.reporter.keep(record)
            good = committed(self.checkpoints)
            kept = f"{good[0].name} is complete" if good else "nothing was saved before"
            e.add_note(f"The evaluation after step {record['step']} failed; {kept}.")
            raise
        self.reporter.log(record | metrics)

    def _evaluate(self, step: int) -> dict[str, Any]:
        """Returns validation metrics and shows a sample; returns {} if a rank was told to stop."""
        config, process = self.config, self.process
        process.heartbeat.at("evaluate", step)
        metrics = evaluate(config, self.data, self.strategy, self.module, process)
        if metrics is None:
            return {}
        if config.evaluation.sample_prompt is not None:
            text = generate(config, self.data.tokenizer, self.strategy, self.module, process)
            if text is not None:
                self.reporter.sample(step, config.evaluation.sample_prompt, text)
        return metrics

    def _loader(self, first_sample: int) -> TrainLoader:
        config, world = self.config, self.world
        return TrainLoader(
            self.data,
            max_seq_len=config.data.max_seq_len,
            mask_documents=config.data.mask_documents,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            first_sample=first_sample,
            pin=world.device.type == "cuda",
            order=self.order,
            apart=self.module.apart,
        )

    def _time_is_up(self, began: float) -> bool:
        minutes = self.config.stop.minutes
        return minutes is not None and time.monotonic() - began >= minutes * 60


class _Step:
    """Holds what one step computes: sums of the loss and its parts, and the gradient norm.

    Attributes:
        grad_norm: Gradient norm before clipping, a scalar on the device.
        anomaly: Reason why the update is skipped; None if it is not.
        means: Means of the loss and its parts over all ranks' targets, once they are reduced.
    """

    grad_norm: Tensor

    def __init__(self, num_targets: float) -> None:
        self._num_targets = num_targets
        self._sums: dict[str, Tensor] = {}
        self.anomaly: str | None = None
        self.means: dict[str, float] = {}

    def add(self, sums: dict[str, Tensor]) -> None:
        """Adds a micro-batch of this rank."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def all_reduce(self) -> None:
        """Sums over ranks, if that was not done before; collective, and waits for the device."""
        if not self.means:
            total = torch.stack([*self._sums.values()])
            dist.all_reduce(total)
            means = [value / self._num_targets for value in total.tolist()]
            self.means = dict(zip(self._sums, means, strict=True))

    @property
    def loss(self) -> float:
        """Training loss in nats per token, once it is reduced."""
        return self.means["loss"]


def _due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Returns a new seed for each step, so that a resume needs no saved generator state."""
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    # 63 bits fit into a signed 64-bit integer.
    return int.from_bytes(digest[:8], "little") >> 1
