"""Healing: runs the trainer as a program, with the parent as the teacher.

`compression.stage_runner` keeps a healed model only if it is better than before: distillation on
too little text, or on text unlike the model's training data, can do harm.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path

import yaml

from compression.recipe import HealConfig
from core import layout
from core.errors import ConfigError, ExitCode, Interrupted, SpotforgeError
from core.process.child import Child, describe_exit, run
from core.process.python import environment, python
from core.settings.command import without
from trainer.data.config import DataConfig, MixtureDataConfig

_POLL_S = 0.5


def heal(
    model: Path,
    teacher: Path,
    config: HealConfig,
    data: DataConfig,
    keep_zeros: bool,
    seed: int,
    folder: Path,
    stop_requested: Callable[[], bool],
) -> Path:
    """Trains a model towards a teacher, and resumes a run that was stopped.

    Args:
        model: A dense Hugging Face folder.
        teacher: Hugging Face folder of the teacher, with the same tokenizer.
        config: Number of tokens, learning rate, batch size and more words for the trainer.
        data: Data to train on.
        keep_zeros: Keeps weights that are zero at zero.
        seed: Seed of the order of samples.
        folder: Folder of the training run.
        stop_requested: Function that is polled while the trainer runs.

    Returns:
        Folder of the trained model.

    Raises:
        Interrupted: A stop was requested; the same call goes on from there.
        SpotforgeError: The trainer failed; its own message is on stderr.
    """
    _write_data_option(folder / "conf", data)
    tokens_of_step = config.global_batch_size * data.max_seq_len
    # Rounded up: `tokens` is the least to train on.
    steps = -(-config.tokens // tokens_of_step)
    words = [
        "model=pretrained",
        f"model.path={model}",
        f"model.keep_zeros={str(keep_zeros).lower()}",
        "objective=distill",
        f"objective.teacher={teacher}",
        "data=of_compression",
        f"run.dir={folder / 'run'}",
        f"stop.steps={steps}",
        f"seed={seed}",
        f"optim.lr={config.lr}",
        f"global_batch_size={config.global_batch_size}",
        f"micro_batch_size={min(4, config.global_batch_size)}",
        f"schedule.warmup_steps={steps // 20}",
        "deterministic=true",
    ]
    # A word of the user replaces ours of the same key: Hydra refuses a key that is given twice.
    words = [*without(words, config.overrides), *config.overrides]
    command = python("-m", "trainer", "--config-dir", str(folder / "conf"), *words)
    code = _run(command, stop_requested)
    if code == ExitCode.START_AGAIN:
        raise Interrupted("stopped while healing; the same command goes on from there")
    if code != ExitCode.FINISHED:
        failure = SpotforgeError(f"recipe.heal: the trainer {describe_exit(code)}, see above")
        # Settings that the trainer refuses are the user's, handed on by `overrides` or `data`.
        failure.exit_code = ExitCode.BAD_CONFIG if code == ExitCode.BAD_CONFIG else ExitCode.FAILED
        raise failure
    return folder / "run" / layout.EXPORT


def check_overrides(overrides: list[str], key: str) -> None:
    """Raises ConfigError for words that the trainer does not accept.

    Args:
        overrides: Words for the trainer's command line.
        key: Key of the setting that holds them, for errors.
    """
    if not overrides:
        return
    done = run(python("-m", "trainer", "--cfg", "job", *overrides), environment())
    if done.code != 0:
        rule, fix = f"the trainer refuses it: {done.last_line}", "see python -m trainer --help"
        raise ConfigError(key, overrides, rule, fix)


def _run(command: list[str], stop_requested: Callable[[], bool]) -> int:
    """Runs the trainer to its end, and passes a requested stop on to it once."""
    told = False
    with Child(command, environment()) as trainer:
        while (code := trainer.wait(_POLL_S)) is None:
            if stop_requested() and not told:
                told = True
                trainer.send(signal.SIGTERM)
    return code


def _write_data_option(folder: Path, data: DataConfig) -> None:
    """Writes the data as an option of the trainer's group `data`."""
    schema = "mixture" if isinstance(data, MixtureDataConfig) else "single"
    settings = json.loads(json.dumps(dataclasses.asdict(data), default=lambda enum: enum.value))
    option = {"defaults": [f"/schema/data/{schema}@_here_", "_self_"], **settings}
    path = folder / "data" / "of_compression.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(option, sort_keys=False))
