"""What Hydra knows of the settings of a server."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from serving.config import ServingConfig


def register_schemas() -> None:
    """Tells Hydra about the dataclass."""
    ConfigStore.instance().store(group="schema", name="serving", node=ServingConfig)
