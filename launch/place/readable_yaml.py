"""YAML for people: keys in their order, scripts line by line."""

from typing import Any

import yaml


def to_yaml(*documents: Any) -> str:
    """Returns documents as readable YAML."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Writes texts of several lines as block scalars, and repeated values in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> Any:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
