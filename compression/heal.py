"""Healing: the trainer, as a program, with the parent as its teacher.

A healed model that is worse than it was is not taken: distillation on too little or on other text
than a model was trained on can do harm.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path

import yaml

from compression.recipe import HealConfig
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
    """Trains a model towards a teacher, on from where it was stopped.

    Args:
        model: A dense Hugging Face folder.
        teacher: Another, with the same tokenizer.
        config: How long.
        data: To train on.
        keep_zeros: Whether weights that are zero stay so.
        seed: Of the order of samples.
        folder: For the run.
        stop_requested: Polled.

    Returns:
        The healed model's folder.

    Raises:
        Interrupted: Told to stop; the same call goes on.
        SpotforgeError: The trainer failed; what it said is on stderr.
    """
    _write_data_option(folder / "conf", data)
    tokens_of_step = config.global_batch_size * data.max_seq_len
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
    words = [*without(words, config.overrides), *config.overrides]
    command = python("-m", "trainer", "--config-dir", str(folder / "conf"), *words)
    code = _run(command, stop_requested)
    if code == ExitCode.START_AGAIN:
        raise Interrupted("stopped while healing; the same command goes on from there")
    if code != ExitCode.FINISHED:
        failure = SpotforgeError(f"recipe.heal: the trainer {describe_exit(code)}, see above")
        failure.exit_code = ExitCode.BAD_CONFIG if code == ExitCode.BAD_CONFIG else ExitCode.FAILED
        raise failure
    return folder / "run" / "export"


def check_overrides(overrides: list[str], key: str) -> None:
    """Raises ConfigError for words that the trainer does not take; `key` is theirs."""
    if not overrides:
        return
    done = run(python("-m", "trainer", "--cfg", "job", *overrides), environment())
    if done.code != 0:
        rule, fix = f"the trainer refuses it: {done.last_line}", "see python -m trainer --help"
        raise ConfigError(key, overrides, rule, fix)


def _run(command: list[str], stop_requested: Callable[[], bool]) -> int:
    """Runs the trainer to its end, and tells it to stop when this process is told."""
    told = False
    with Child(command, environment()) as trainer:
        while (code := trainer.wait(_POLL_S)) is None:
            if stop_requested() and not told:
                told = True
                trainer.send(signal.SIGTERM)
    return code


def _write_data_option(folder: Path, data: DataConfig) -> None:
    """The data as an option of the trainer's group."""
    schema = "mixture" if isinstance(data, MixtureDataConfig) else "single"
    settings = json.loads(json.dumps(dataclasses.asdict(data), default=lambda enum: enum.value))
    option = {"defaults": [f"/schema/data/{schema}@_here_", "_self_"], **settings}
    path = folder / "data" / "of_compression.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(option, sort_keys=False))
