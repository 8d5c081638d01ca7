"""What Hydra knows of the settings of a compression, beside the trainer's data."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from compression.config import CompressionConfig
from compression.recipe import (
    AutoConfig,
    AwqConfig,
    GptqConfig,
    HealConfig,
    MixedConfig,
    PruneConfig,
    QatConfig,
    RoundConfig,
    SmoothQuantConfig,
    StructuredPruneConfig,
)
from trainer.schemas import register_schemas as register_trainer_schemas

_STEPS = {
    "auto": AutoConfig,
    "round": RoundConfig,
    "gptq": GptqConfig,
    "heal": HealConfig,
    "qat": QatConfig,
    "mixed": MixedConfig,
    "awq": AwqConfig,
    "smoothquant": SmoothQuantConfig,
    "prune": PruneConfig,
    "prune_structured": StructuredPruneConfig,
}


def register_schemas() -> None:
    """Tells Hydra about the dataclasses."""
    register_trainer_schemas()
    store = ConfigStore.instance()
    store.store(group="schema", name="compression", node=CompressionConfig)
    for name, schema in _STEPS.items():
        store.store(group="schema/recipe", name=name, node=schema)
