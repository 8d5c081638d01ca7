"""The settings of a job: the trainer's and the launcher's, composed by Hydra from one line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.config import LaunchConfig
from monitoring.errors import ConfigError, ExitCode, SpotforgeError
from trainer.cli import CONFIG_DIR, explain
from trainer.config import TrainerConfig
from trainer.schemas import refuse_unknown_keys, register_schemas

_OF_LAUNCH = re.compile(r"[+~]*launch[.=]")
# Keys whose own keys are the user's: Hydra wants to be told that they are new.
_OPEN = re.compile(
    r"launch\.(countries|discounts|env|kubernetes\.node_labels|pools|preemption_hours|quotas)[.=]"
)


class RefusedByHydra(SpotforgeError):
    """A word that Hydra cannot take, in one line."""

    exit_code = ExitCode.BAD_CONFIG


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
        ConfigError: Whatever Hydra refuses.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError("--config-dir", config_dir, "there is no such folder", "check the path")
    register_schemas()
    ConfigStore.instance().store(group="schema", name="launch", node=LaunchConfig)
    launch_words = [
        f"++{word}" if _OPEN.match(word) else word for word in words if _OF_LAUNCH.match(word)
    ]
    overrides = tuple(word for word in words if not _OF_LAUNCH.match(word))
    trainer = _compose("trainer", overrides, config_dir)
    launch = _compose("launch", launch_words, config_dir)["launch"]
    refuse_unknown_keys(trainer)
    refuse_unknown_keys(launch, "launch.")
    return Settings(trainer, launch, overrides)


def _compose(name: str, overrides: Sequence[str], config_dir: Path | None) -> Any:
    more = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.absolute()}]"]
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            return OmegaConf.to_object(compose(name, [*overrides, *more]))
    except (HydraException, OmegaConfBaseException) as e:
        raise RefusedByHydra(explain(e, "python -m launch plan --help")) from e
    except yaml.YAMLError as e:
        rule = f"is not YAML: {' '.join(str(e).split())}"
        raise ConfigError("--config-dir", config_dir, rule, "correct the file") from e
    except UnicodeDecodeError as e:
        rule = f"has a file that is not UTF-8 ({e})"
        raise ConfigError("--config-dir", config_dir, rule, "save it as UTF-8") from e
    except ValueError as e:  # Hydra's, of a group that is null
        nulls = " ".join(word for word in overrides if word.endswith("=null"))
        raise RefusedByHydra(f"{nulls}: {e}; name one of its options") from e
