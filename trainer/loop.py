"""The training loop. It knows parallelism only as `Strategy`, and ranks only as `World`."""

import dataclasses
import hashlib
import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import DivergedError, ExitCode
from monitoring.throughput import Throughput
from parallel.strategy import Strategy
from parallel.world import World
from trainer.anomaly import AnomalyAction, LossWatch
from trainer.checkpoint import TrainerState, committed, read_state
from trainer.checkpointer import Checkpointer
from trainer.config import TrainerConfig
from trainer.data.loader import Batch, TrainLoader
from trainer.data.prepare import PreparedData
from trainer.evaluation import evaluate, generate, held_out_batches, prompt_ids
from trainer.heartbeat import Heartbeat
from trainer.interval import Interval, SaveSchedule, expected_mtbf_s
from trainer.objective import Objective
from trainer.reporter import Reporter, count_crashes, save_costs_s
from trainer.resume import find_checkpoint, state_reader
from trainer.stopping import StopSignal


class TrainingLoop:
    """Runs one optimizer step after another, starting from `state`.

    Raises:
        ConfigError: The data is too short for one sample to train on, or to validate with.
    """

    def __init__(
        self,
        config: TrainerConfig,
        world: World,
        data: PreparedData,
        module: Objective,
        strategy: Strategy,
        checkpointer: Checkpointer,
        reporter: Reporter,
        stop: StopSignal,
        heartbeat: Heartbeat,
        state: TrainerState,
    ) -> None:
        self.config, self.world, self.data = config, world, data
        self.module, self.strategy = module, strategy
        self.checkpointer, self.reporter = checkpointer, reporter
        self.stop, self.heartbeat = stop, heartbeat
        self.state = state
        assert state.order is not None, "the run sets it at its start or when it resumes"
        self.order = state.order
        self.checkpoints = config.run_dir / "checkpoints"
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
        held_out_batches(config, data, world, module.apart)  # raises now if there is no sample
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
        loss: _StepLoss | None = None
        outcome = ExitCode.FINISHED
        try:
            if config.evaluation.at_start and state.step == 0:
                self._evaluate_and_log({"step": 0, "num_tokens": 0, "elapsed_s": state.elapsed_s})
            while total_steps is None or state.step < total_steps:
                self.heartbeat.at("train", state.step)
                # 1. This rank's micro-batches of the next global batch
                wait_began = time.perf_counter()
                batches = next(self.loader)
                data_wait_s = time.perf_counter() - wait_began

                # 2. All that ranks must agree on, in one small collective on the CPU
                num_targets, stop, time_up, save_failed, save_due = world.sum(
                    sum(batch.num_targets for batch in batches),
                    self.stop.requested(),
                    world.rank == 0 and self._time_is_up(began),
                    self.checkpointer.failed,
                    world.rank == 0 and self.save_schedule.due(state.step + 1),
                )
                if save_failed:
                    self.checkpointer.wait()  # raises the error on every rank
                if stop:
                    outcome = ExitCode.START_AGAIN
                if stop or time_up:
                    break

                # 3. Forward, backward, update
                lr = config.optim.lr * config.schedule.scale(state.step, total_steps)
                strategy.set_lr(lr)
                loss, grad_norm, anomaly = self._train_step(batches, num_targets, state.step)
                if anomaly is not None:
                    state = self._recover(anomaly, loss.value(), state)
                    continue
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
                evaluates = last or _due(state.step, config.evaluation.every_steps)
                record: dict[str, Any] | None = None
                if evaluates or _due(state.step, config.log.every_steps):
                    self._refuse_divergence(state, loss.value(), grad_norm.item())
                    record = {
                        "step": state.step,
                        **loss.means(),
                        "grad_norm": grad_norm.item(),
                        "lr": lr,
                        "num_tokens": state.num_tokens,
                        **throughput.window(),
                        "checkpoint_blocking_s": blocked_s,
                        "elapsed_s": state.elapsed_s,
                    }
                    blocked_s = 0.0
                else:
                    self.reporter.progress(state.step)
                if record is None and not save_due:
                    continue
                with throughput.paused():
                    if last or save_due:
                        blocked_s += self._save(state, loss)
                        saved_step = state.step
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
            self._save(state, loss)
        self.checkpointer.wait()
        return state, outcome

    def _train_step(
        self, batches: list[Batch], num_targets: float, step: int
    ) -> tuple["_StepLoss", Tensor, str | None]:
        """Runs one update; returns the global loss, the gradient norm, and any reason to skip it.

        The loss is summed, then divided by the global count, so every split of a global batch gives
        the same gradient.
        """
        config, world, strategy = self.config, self.world, self.strategy
        loss = _StepLoss(num_targets)
        anomaly = None
        torch.manual_seed(_step_seed(config.seed, step, world.rank))  # for dropout
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            on_device = batch.to(world.device)
            with strategy.accumulate(last=last):
                loss_sum = strategy.forward(**on_device.inputs())
                loss.add({"loss": loss_sum.detach(), **self.module.parts})
                if last and self.judges_every_loss:
                    anomaly = self.loss_watch.verdict(loss.value())
                # Every strategy discards a gradient that is not finite. NaN is the one way to take
                # back micro-batches that were already accumulated or reduced.
                strategy.backward(loss_sum / (num_targets if anomaly is None else math.nan))
        grad_norm = strategy.step(config.optim.max_norm, skip_not_finite=self.judges_every_loss)
        if anomaly is None and self.judges_every_loss and not math.isfinite(grad_norm.item()):
            anomaly = f"the gradient norm is {grad_norm.item()}"
        return loss, grad_norm, anomaly

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
        self.checkpointer.wait()
        newest = dataclasses.replace(self.config, resume="auto")
        checkpoint = find_checkpoint(newest, self.checkpoints, self.world, self.reporter)
        if checkpoint is None:
            raise self._diverged(state, f"{anomaly}, and there is no checkpoint to roll back to")
        saved = read_state(checkpoint)
        self.reporter.say(f"{what}; rolling back to {checkpoint.name}, then using later batches")
        self.reporter.event("rollback", state.step, to_step=saved.step, loss=loss, reason=anomaly)
        self.reporter.roll_back(saved.step)
        self.strategy.load_state(state_reader(checkpoint), num_updates=saved.step)
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

    def _refuse_divergence(self, state: TrainerState, loss: float, grad_norm: float) -> None:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
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

    def _save(self, state: TrainerState, loss: "_StepLoss | None") -> float:
        """Saves and returns the seconds it took from training; raises if the loss is not finite."""
        self.heartbeat.at("save", state.step)
        if loss is not None:
            self._refuse_divergence(state, loss.value(), 0.0)
        blocked_s = self.checkpointer.save(self.strategy.state, state)
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
        config, world = self.config, self.world
        self.heartbeat.at("evaluate", step)
        metrics = evaluate(config, self.data, self.strategy, self.module, world, self._poll)
        if metrics is None:
            return {}
        if config.evaluation.sample_prompt is not None:
            text = generate(
                config, self.data.tokenizer, self.strategy, self.module, world, self._poll
            )
            if text is not None:
                self.reporter.sample(step, config.evaluation.sample_prompt, text)
        return metrics

    def _poll(self) -> bool:
        self.heartbeat.beat()
        return self.stop.requested()

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


class _StepLoss:
    """Sums the loss of a step and its parts; sums over ranks when the value is first read."""

    def __init__(self, num_targets: float) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num_targets = num_targets
        self._means: dict[str, float] | None = None

    def add(self, sums: dict[str, Tensor]) -> None:
        """Adds a micro-batch of this rank."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self) -> dict[str, float]:
        """Returns means over all ranks' targets; the first call is collective and waits."""
        if self._means is None:
            total = torch.stack([*self._sums.values()])
            dist.all_reduce(total)
            self._means = {
                name: value / self._num_targets
                for name, value in zip(self._sums, total.tolist(), strict=True)
            }
        return self._means

    def value(self) -> float:
        """Returns the training loss in nats per token; see `means`."""
        return self.means()["loss"]


def _due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Returns a new seed for each step, so that a resume needs no saved generator state."""
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    # 63 bits fit into a signed 64-bit integer.
    return int.from_bytes(digest[:8], "little") >> 1
