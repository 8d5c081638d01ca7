"""A training run on one rank, from joining the others to the exported folder."""

from __future__ import annotations

import dataclasses
import json
import os
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from monitoring.errors import ExitCode
from parallel.strategy import Strategy
from parallel.world import World, join_world
from trainer.checkpoint import Checkpointer, TrainerState, read_state, read_tensors, step_name
from trainer.config import TrainerConfig
from trainer.cpu import keep_freed_memory
from trainer.data.prepare import PreparedData, prepare
from trainer.data.tokenizer import vocab_size_of
from trainer.export import export_checkpoint
from trainer.loop import TrainingLoop
from trainer.model import Materializer, build_meta_model, hf_config_of, prepare_training
from trainer.objective import NextTokenLoss
from trainer.reporter import Reporter, check_run_dir
from trainer.resume import check_same_model, check_same_run, find_checkpoint
from trainer.stopping import StopSignal


def train(config: TrainerConfig, stop: StopSignal) -> ExitCode:
    """Runs, or goes on with, the run that `config` describes; called on every rank.

    Returns:
        FINISHED, or START_AGAIN after a stop signal, with a complete checkpoint.

    Raises:
        SpotforgeError: If the configuration, the data or the disk does not allow it.
    """
    _set_up_process(config)
    with join_world() as world:
        with world.together():
            config.check(world.world_size)

        # 1. Data: prepared once, by whichever rank comes first
        with world.together():
            check_run_dir(config)
            hf_config_of(config.model)  # refused before the data is prepared, if at all
            data = prepare(
                config.data,
                model_path=getattr(config.model, "path", None),
                stop_requested=stop.requested,
            )
            if config.data.verify:
                data.verify(world.local_rank, world.local_world_size, stop.requested)

        # 2. The model, on the meta device until its strategy knows where each part goes
        with world.together():
            model = build_meta_model(config.model, vocab_size_of(data.tokenizer))
            module = NextTokenLoss(model, config.model.fused_loss)
        resolved = resolve(config)
        reporter = Reporter(config, resolved, data, model, world)

        # 3. The checkpoint to go on from: refused here, if at all, before anything is written
        folder = config.run_dir / "checkpoints"
        state = TrainerState(0, 0, 0, 0.0, data.digest, data.tokenizer_fingerprint, resolved)
        with world.together():
            checkpoint = find_checkpoint(config, folder, world, reporter.say)
            if checkpoint is not None:
                saved = read_state(checkpoint)
                check_same_run(config, state, saved, reporter.say)
                check_same_model(checkpoint, dict(model.named_parameters()))
                reporter.say(f"resuming after step {saved.step}, from {checkpoint}")
                state = dataclasses.replace(saved, config=resolved)

        # 4. The strategy materializes and distributes the model, and builds its optimizer
        prepare_training(
            model, compile=config.compile, checkpointing=config.activation_checkpointing
        )
        matrices = {name for name, p in model.named_parameters() if p.ndim >= 2}
        with world.together():
            strategy: Strategy = config.parallel.build(world, config.precision)
            strategy.setup(
                module,
                Materializer(module, model, config.model, config.seed, world.device),
                partial(config.optim.build, decayed=matrices),
            )
        if checkpoint is not None:
            strategy.load_state(partial(read_tensors, checkpoint), num_updates=state.step)

        # 5. The loop
        checkpointer = Checkpointer(
            config.checkpoint, folder, world, partial(_save_assets, model, data)
        )
        with world.together():
            loop = TrainingLoop(
                config, world, data, module, strategy, checkpointer, reporter, stop, state
            )
        reporter.open(state.step)
        try:
            state, outcome = loop.run()
        except BaseException:
            reporter.close("failed")
            raise
        finally:
            checkpointer.close()

        # 6. What is handed on
        _finish(config, world, reporter, folder / step_name(state.step), outcome)
        return outcome


def resolve(config: TrainerConfig) -> dict[str, Any]:
    """The settings as plain data, to be stored and compared."""
    text = json.dumps(dataclasses.asdict(config), default=_enum_value)
    settings: dict[str, Any] = json.loads(text)
    return settings | {"total_steps": config.total_steps}


def _finish(
    config: TrainerConfig, world: World, reporter: Reporter, checkpoint: Path, outcome: ExitCode
) -> None:
    finished = outcome is ExitCode.FINISHED
    with world.together():
        if finished and config.export.at_end and world.rank == 0:
            export_checkpoint(checkpoint, config.run_dir / "export", config.export.dtype)
    reporter.close("finished" if finished else "stopped")
    if finished:
        reporter.say_what_next(checkpoint)
    else:
        reporter.say(f"stopped after saving {checkpoint}; the same command goes on from there")
    world.barrier()


def _set_up_process(config: TrainerConfig) -> None:
    keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _save_assets(model: PreTrainedModel, data: PreparedData, folder: Path) -> None:
    """What an export needs beside tensors."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)


def _enum_value(item: object) -> Any:
    if isinstance(item, Enum):
        return item.value
    raise TypeError(f"{type(item).__name__} has no place in a configuration")
