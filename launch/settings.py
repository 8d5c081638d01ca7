"""The settings of a job: those of the trainer and of the launcher, from one command line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.settings.command import Command
from launch.config import LaunchConfig
from trainer.command import TRAINER
from trainer.config import TrainerConfig

_OF_LAUNCH = re.compile(r"[+~]*launch[.=]")

LAUNCH = Command(
    program="python -m launch plan",
    about="The keys of the launcher, beside those of the trainer.",
    schema=LaunchConfig,
    root="launch",
    at="launch",
)


@dataclass(frozen=True)
class Settings:
    """The settings that one command line makes.

    Attributes:
        trainer: Settings of the trainer, the same as `python -m trainer` composes.
        launch: Settings under `launch.`.
        overrides: Words that compose `trainer`; the placed job runs the trainer with them.
    """

    trainer: TrainerConfig
    launch: LaunchConfig
    overrides: tuple[str, ...]


def compose_settings(words: Sequence[str], config_dir: Path | None = None) -> Settings:
    """Composes both configurations.

    Args:
        words: Overrides; those of `launch` go to the launcher, the others to the trainer.
        config_dir: Folder with more options (`experiment/mine.yaml`, `launch/team.yaml`).

    Raises:
        ConfigError: A key is unknown, a value breaks its rule, or an option does not exist.
    """
    of_trainer, of_launch = split_words(words)
    trainer = TRAINER.compose(of_trainer, config_dir)
    return Settings(trainer, LAUNCH.compose(of_launch, config_dir), tuple(of_trainer))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words for the trainer, and those for the launcher."""
    of_launch = [word for word in words if _OF_LAUNCH.match(word)]
    return [word for word in words if not _OF_LAUNCH.match(word)], of_launch
