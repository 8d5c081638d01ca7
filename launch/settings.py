"""The settings of a job: the trainer's and the launcher's, composed by Hydra from one line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from core.errors import ConfigError, ExitCode, SpotforgeError
from launch.config import (
    KubernetesConfig,
    LaunchConfig,
    PoolConfig,
    SkyPilotConfig,
    SlurmConfig,
)
from trainer.cli import CONFIG_DIR, as_meant, explain
from trainer.config import TrainerConfig
from trainer.schemas import refuse_unknown_keys, register_schemas

_OF_LAUNCH = re.compile(r"[+~]*launch[.=]")
# Keys whose own keys are the user's: Hydra wants to be told that they are new.
_OPEN = re.compile(
    r"launch\.(countries|discounts|env|kubernetes\.node_labels|pools|preemption_hours|quotas)[.=]"
)


_LISTS = {f"launch.{f.name}" for f in fields(LaunchConfig) if str(f.type).startswith("list[")}
_GROUPS = {
    "launch": LaunchConfig,
    "launch.skypilot": SkyPilotConfig,
    "launch.slurm": SlurmConfig,
    "launch.kubernetes": KubernetesConfig,
    "launch.pools.NAME": PoolConfig,
}
_HELP = "python -m launch plan --help"


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
    launch_words = [_as_hydra_wants(word) for word in words if _OF_LAUNCH.match(word)]
    overrides = tuple(word for word in words if not _OF_LAUNCH.match(word))
    trainer = _compose("trainer", overrides, config_dir)
    launch = _compose("launch", launch_words, config_dir)["launch"]
    refuse_unknown_keys(trainer)
    refuse_unknown_keys(launch, "launch.")
    return Settings(trainer, launch, overrides)


def _as_hydra_wants(word: str) -> str:
    """A word of `launch` with what Hydra asks for: `++` for a new key, `[]` around a list."""
    if _OPEN.match(word):
        return f"++{word}"
    key, _, value = word.partition("=")
    is_one = value not in ("", "null") and not value.startswith(("[", "$"))
    return f"{key}=[{value}]" if key in _LISTS and is_one else word


def _compose(name: str, overrides: Sequence[str], config_dir: Path | None) -> Any:
    more = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.absolute()}]"]
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            return OmegaConf.to_object(compose(name, [*as_meant(overrides), *more]))
    except (HydraException, OmegaConfBaseException) as e:
        raise RefusedByHydra(_explained(e)) from e
    except yaml.YAMLError as e:
        rule = f"is not YAML: {' '.join(str(e).split())}"
        raise ConfigError("--config-dir", config_dir, rule, "correct the file") from e
    except UnicodeDecodeError as e:
        rule = f"has a file that is not UTF-8 ({e})"
        raise ConfigError("--config-dir", config_dir, rule, "save it as UTF-8") from e
    except ValueError as e:  # Hydra's, of a group that is null
        nulls = " ".join(word for word in overrides if word.endswith("=null"))
        raise RefusedByHydra(f"{nulls}: {e}; name one of its options") from e


def _explained(error: Exception) -> str:
    """One line: the trainer's, but for words that Hydra cannot read and the keys of `launch`."""
    if isinstance(error, OverrideParseException):
        fix = """write key=value; with more than letters, digits and -_./ in it: 'key="value"'"""
        return f"{error.override}: Hydra cannot read it ({error.__context__}); {fix}"
    cause = error.__cause__ or error.__context__ or error
    key = str(getattr(cause, "full_key", None) or "")
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and key.startswith("launch."):
        return f"{key}: no such key; {_nearest_key(key)}"
    if isinstance(cause, OmegaConfBaseException) and key.startswith("launch."):
        return f"{key}: {str(cause).splitlines()[0]}; {_HELP} lists the keys"
    return explain(error, _HELP).removeprefix(": ")


def _nearest_key(key: str) -> str:
    """The fix for a key of `launch` that there is not: one beside it, else one of another group."""
    group, _, name = key.rpartition(".")
    group = re.sub(r"^launch\.pools\..*", "launch.pools.NAME", group)
    for groups in ([group] if group in _GROUPS else [], _GROUPS):
        known = {f.name: f"{found}.{f.name}" for found in groups for f in fields(_GROUPS[found])}
        if close := get_close_matches(name, known, n=1, cutoff=0.57):
            return f"did you mean {known[close[0]]}?"
    return f"{_HELP} lists the keys"
