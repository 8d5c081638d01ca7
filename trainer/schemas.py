"""What Hydra knows of the settings.

Every dataclass is registered as `schema/<group>/<option>`, and the YAML of that name starts from
it, so that a misspelt key or a wrong type fails before anything runs.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

from core.errors import ConfigError
from monitoring.config import MonitoringConfig
from parallel.config import DdpConfig, FsdpConfig, PrecisionConfig, ZeroConfig
from trainer.config import (
    CheckpointConfig,
    DistillConfig,
    NamedModelConfig,
    PathModelConfig,
    PretrainConfig,
    TrainerConfig,
)
from trainer.data.config import MixtureDataConfig, SingleDataConfig
from trainer.optim import AdamWConfig
from trainer.schedule import ConstantConfig, CosineConfig, WarmupStableDecayConfig

_SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"named": NamedModelConfig, "path": PathModelConfig},
    "objective": {"pretrain": PretrainConfig, "distill": DistillConfig},
    "data": {"single": SingleDataConfig, "mixture": MixtureDataConfig},
    "parallel": {"ddp": DdpConfig, "fsdp": FsdpConfig, "zero": ZeroConfig},
    "optim": {"adamw": AdamWConfig},
    "schedule": {
        "cosine": CosineConfig,
        "wsd": WarmupStableDecayConfig,
        "constant": ConstantConfig,
    },
    "precision": {"base": PrecisionConfig},
    "checkpoint": {"base": CheckpointConfig},
    "monitoring": {"base": MonitoringConfig},
}


def register_schemas() -> None:
    """Tells Hydra about the dataclasses."""
    store = ConfigStore.instance()
    store.store(group="schema", name="trainer", node=TrainerConfig)
    for group, options in _SCHEMAS.items():
        for name, schema in options.items():
            store.store(group=f"schema/{group}", name=name, node=schema)


def refuse_unknown_keys(config: Any, prefix: str = "") -> None:
    """Raises ConfigError for a key that `+key=value` added and no dataclass has."""
    known = {f.name for f in fields(config)}
    for name, value in vars(config).items():
        if name not in known:
            raise ConfigError(
                f"{prefix}{name}",
                value,
                "there is no such key, and nothing would read it",
                "remove it",
            )
        for child, key in _dataclasses_in(value, f"{prefix}{name}"):
            refuse_unknown_keys(child, f"{key}.")


def _dataclasses_in(value: Any, key: str) -> list[tuple[Any, str]]:
    if is_dataclass(value):
        return [(value, key)]
    if isinstance(value, dict):
        return [(v, f"{key}.{k}") for k, v in value.items() if is_dataclass(v)]
    return []


def options_with_key(group: str, key: str) -> list[str]:
    """Schemas of a group that have `key`: for the error that names where it would work."""
    schemas = _SCHEMAS.get(group, {})
    return [name for name, schema in schemas.items() if key in {f.name for f in fields(schema)}]
