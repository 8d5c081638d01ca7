"""Lists the keys of settings dataclasses, for help, spelling hints and dicts with free keys."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from core.settings.rules import join

NAME = "NAME"  # stands in a path for a name that the user chooses


@dataclass(frozen=True)
class Key:
    """Describes one key.

    Attributes:
        path: Dotted path, e.g. `launch.pools.NAME.gpu`.
        type: Type of the value, without null where null is allowed.
        about: Description in the docstring of its dataclass.
        group: Group whose options may have the key; empty for a key that always exists.
        schema: Name, within the group, of the dataclass that has the key.
    """

    path: str
    type: Any
    about: str
    group: str = ""
    schema: str = ""

    @property
    def is_open(self) -> bool:
        """True if the user chooses the names of the keys below it."""
        return get_origin(self.type) is dict

    @property
    def is_list(self) -> bool:
        """True if the value is a list."""
        return get_origin(self.type) is list

    @property
    def choices(self) -> list[str]:
        """Names of the enum's members; empty for another type."""
        is_enum = isinstance(self.type, type) and issubclass(self.type, Enum)
        return [item.name for item in self.type] if is_enum else []


def keys_of(schema: type, at: str = "", skip: Sequence[str] = ()) -> Iterator[Key]:
    """Yields the keys of a dataclass and of nested dataclasses, in the order of the fields.

    Args:
        schema: Dataclass to list.
        at: Dotted path of the dataclass in the tree.
        skip: Paths to leave out: groups, whose keys are listed with their options.
    """
    types_, about = get_type_hints(schema), _about(schema)
    for name in (f.name for f in fields(schema)):
        path, hint = join(at, name), _not_null(types_[name])
        if path in skip:
            continue
        if isinstance(hint, type) and is_dataclass(hint):
            yield from keys_of(hint, path)
            continue
        yield Key(path, hint, about.get(name, ""))
        item = get_args(hint)[1] if get_origin(hint) is dict else None
        if isinstance(item, type) and is_dataclass(item):
            yield from keys_of(item, f"{path}.{NAME}")


def matches(template: str, key: str) -> bool:
    """Returns whether a key matches a path in which `NAME` stands for any name."""
    path, given = template.split("."), key.split(".")
    return len(path) == len(given) and all(a in (NAME, b) for a, b in zip(path, given, strict=True))


def _not_null(hint: Any) -> Any:
    """Returns a type hint without None."""
    if get_origin(hint) in (Union, types.UnionType):
        left = [part for part in get_args(hint) if part is not type(None)]
        return left[0] if len(left) == 1 else hint
    return hint


def _about(schema: type) -> dict[str, str]:
    """Returns the descriptions of fields in the `Attributes:` sections of a class and its bases."""
    found: dict[str, str] = {}
    # From the base to the class itself, so that the class's own description wins.
    for base in reversed(schema.__mro__):
        section = re.search(r"^Attributes:\n((?: .*\n?|\n)+)", inspect.getdoc(base) or "", re.M)
        if section and "__dataclass_fields__" in vars(base):
            entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1], re.M)
            found |= {name: " ".join(text.split()) for name, text in entries}
    return found
