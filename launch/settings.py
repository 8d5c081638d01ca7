"""The settings of a job: the trainer's and the launcher's, composed from one line of words."""

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
    """What the command line says.

    Attributes:
        trainer: As `python -m trainer` would have it.
        launch: The rest.
        overrides: The words that make `trainer`, for the job's own command.
    """

    trainer: TrainerConfig
    launch: LaunchConfig
    overrides: tuple[str, ...]


def compose_settings(words: Sequence[str], config_dir: Path | None = None) -> Settings:
    """Composes both configurations.

    Args:
        words: Overrides; those of `launch` are for the launcher, the others for the trainer.
        config_dir: A folder with more options (`experiment/mine.yaml`, `launch/team.yaml`).

    Raises:
        ConfigError: For whatever is wrong with them.
    """
    of_trainer, of_launch = split_words(words)
    trainer = TRAINER.compose(of_trainer, config_dir)
    return Settings(trainer, LAUNCH.compose(of_launch, config_dir), tuple(of_trainer))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words for the trainer, and those for the launcher."""
    of_launch = [word for word in words if _OF_LAUNCH.match(word)]
    return [word for word in words if not _OF_LAUNCH.match(word)], of_launch
