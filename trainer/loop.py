"""The training loop. All that it knows of parallelism is `Strategy`, and of ranks `World`."""

import dataclasses
import hashlib
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from monitoring.errors import ExitCode
from monitoring.throughput import Throughput
from parallel.strategy import Strategy
from parallel.world import World
from trainer.checkpoint import Checkpointer, TrainerState
from trainer.config import TrainerConfig
from trainer.data.loader import TrainLoader
from trainer.data.prepare import PreparedData
from trainer.evaluation import evaluate, generate, held_out_batches
from trainer.reporter import Reporter
from trainer.stopping import StopSignal


class TrainingLoop:
    """One optimizer step after another, from `state` on, with what each of them needs.

    Raises:
        ConfigError: If the data does not make one sample to train on, or one to validate with.
    """

    def __init__(
        self,
        config: TrainerConfig,
        world: World,
        data: PreparedData,
        module: nn.Module,
        strategy: Strategy,
        checkpointer: Checkpointer,
        reporter: Reporter,
        stop: StopSignal,
        state: TrainerState,
    ) -> None:
        self.config, self.world, self.data = config, world, data
        self.module, self.strategy = module, strategy
        self.checkpointer, self.reporter, self.stop = checkpointer, reporter, stop
        self.state = state
        held_out_batches(config, data, world)
        self.loader = self._loader(state.num_samples)

    def run(self) -> tuple[TrainerState, ExitCode]:
        """Trains until the run is finished or told to stop.

        Returns:
            The last state, of which a checkpoint is committed, and FINISHED or START_AGAIN.
        """
        config, world, strategy, state = self.config, self.world, self.strategy, self.state
        total_steps = config.total_steps
        throughput = Throughput()
        began = time.monotonic() - state.elapsed_s
        saved_step = state.step
        blocked_s = 0.0
        outcome = ExitCode.FINISHED
        try:
            while total_steps is None or state.step < total_steps:
                # 1. This rank's micro-batches of the next global batch
                wait_began = time.perf_counter()
                batches = next(self.loader)
                data_wait_s = time.perf_counter() - wait_began

                # 2. What all ranks must agree on, in one small collective on the CPU
                num_targets, stop, time_up, save_failed = world.sum(
                    sum(batch.num_targets for batch in batches),
                    self.stop.requested(),
                    world.rank == 0 and self._time_is_up(began),
                    self.checkpointer.failed,
                )
                if save_failed:
                    self.checkpointer.wait()  # raises, on every rank
                if stop:
                    outcome = ExitCode.START_AGAIN
                if stop or time_up:
                    break

                # 3. Forward and backward: the loss is summed, then divided by the global count, so
                #    every split of a global batch gives the same gradient
                torch.manual_seed(_step_seed(config.seed, state.step, world.rank))  # dropout
                lr = config.optim.lr * config.schedule.scale(state.step, total_steps)
                strategy.set_lr(lr)
                loss_sum = torch.zeros((), device=world.device)
                for i, batch in enumerate(batches):
                    on_device = batch.to(world.device)
                    with strategy.accumulate(last=i == len(batches) - 1):
                        loss = strategy.forward(
                            input_ids=on_device.input_ids,
                            targets=on_device.targets,
                            position_ids=on_device.position_ids,
                        )
                        strategy.backward(loss / num_targets)
                    loss_sum += loss.detach()

                # 4. Update
                grad_norm = strategy.step(config.optim.max_norm)
                num_tokens = config.global_batch_size * config.data.max_seq_len
                state = dataclasses.replace(
                    state,
                    step=state.step + 1,
                    num_samples=state.num_samples + config.global_batch_size,
                    num_tokens=state.num_tokens + num_tokens,
                    elapsed_s=time.monotonic() - began,
                )
                throughput.step(num_tokens, data_wait_s)

                # 5. Now and then: metrics (the only place that waits for the device), validation,
                #    a checkpoint
                last = state.step == total_steps
                evaluates = last or _due(state.step, config.evaluation.every_steps)
                if evaluates or _due(state.step, config.log.every_steps):
                    dist.all_reduce(loss_sum)
                    record = {
                        "step": state.step,
                        "loss": loss_sum.item() / num_targets,
                        "grad_norm": grad_norm.item(),
                        "lr": lr,
                        "num_tokens": state.num_tokens,
                        **throughput.window(),
                        "checkpoint_blocking_s": blocked_s,
                        "elapsed_s": state.elapsed_s,
                    }
                    blocked_s = 0.0
                    with throughput.paused():
                        if evaluates:
                            record |= self._evaluate(state.step)
                        self.reporter.log(record)
                else:
                    self.reporter.progress(state.step)
                if _due(state.step, config.checkpoint.every_steps) and not last:
                    with throughput.paused():
                        blocked_s += self.checkpointer.save(strategy.state(), state)
                    saved_step = state.step
        finally:
            self.loader.close()
        if state.step == 0 or saved_step != state.step:
            self.checkpointer.save(strategy.state(), state)
        self.checkpointer.wait()
        return state, outcome

    def _evaluate(self, step: int) -> dict[str, Any]:
        """Validation metrics and a sample; nothing where a rank was told to stop meanwhile."""
        config, world = self.config, self.world
        metrics = evaluate(
            config, self.data, self.strategy, self.module, world, self.stop.requested
        )
        if metrics is None:
            return {}
        if config.evaluation.sample_prompt is not None:
            text = generate(config, self.data.tokenizer, self.strategy, self.module, world)
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
        )

    def _time_is_up(self, began: float) -> bool:
        minutes = self.config.stop.minutes
        return minutes is not None and time.monotonic() - began >= minutes * 60


def _due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A fresh seed each step, so that a resume needs no saved generator state."""
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
