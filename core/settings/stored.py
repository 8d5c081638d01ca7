"""Settings in a file, for a program that is started with them later and perhaps again.

The file holds every value, so that what YAML files and defaults say by then changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import yaml

from core.settings.command import Command

_SETTINGS, _SCHEMAS, _GIVEN = "settings", "schemas", "given"


def to_yaml(command: Command, config: Any, given: Collection[str]) -> str:
    """Returns settings as YAML text that `from_yaml` reads.

    Args:
        command: The program that composed them.
        config: An instance of `command.schema`.
        given: Keys that the user set; the others have their defaults.
    """
    from omegaconf import OmegaConf  # here, since it is slow to import and rarely needed

    schemas = {
        group: next(name for name, cls in options.items() if type(getattr(config, group)) is cls)
        for group, options in command.groups.items()
    }
    settings = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    content = {_SCHEMAS: schemas, _GIVEN: sorted(given), _SETTINGS: settings}
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


def from_yaml(command: Command, text: str) -> tuple[Any, frozenset[str]]:
    """Returns what `to_yaml` was given: an instance of `command.schema`, and the keys.

    Args:
        command: The program that composed them.
        text: What `to_yaml` returned.
    """
    from omegaconf import OmegaConf

    content = yaml.safe_load(text)
    tree = OmegaConf.structured(command.schema)
    for group, name in content[_SCHEMAS].items():
        tree[group] = OmegaConf.structured(command.groups[group][name])
    settings = OmegaConf.to_object(OmegaConf.merge(tree, content[_SETTINGS]))
    return settings, frozenset(content[_GIVEN])
