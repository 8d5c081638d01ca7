"""Which keys settings have: read off the dataclasses, for help, near names and open keys."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from core.settings.rules import join

NAME = "NAME"  # stands in a path for a name that the user makes up


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: Dotted, e.g. `launch.pools.NAME.gpu`.
        type: Of its value; of the value that is not null, where null is one.
        about: What the docstring of its dataclass says of it.
        group: The group whose options may have it; empty for a key that is always there.
        schema: The name, in that group, of the dataclass that has it.
    """

    path: str
    type: Any
    about: str
    group: str = ""
    schema: str = ""

    @property
    def is_open(self) -> bool:
        """Whether keys below it are the user's to name."""
        return get_origin(self.type) is dict

    @property
    def is_list(self) -> bool:
        """Whether its value is a list."""
        return get_origin(self.type) is list

    @property
    def choices(self) -> list[str]:
        """The values of an enum; empty for another type."""
        is_enum = isinstance(self.type, type) and issubclass(self.type, Enum)
        return [item.name for item in self.type] if is_enum else []


def keys_of(schema: type, at: str = "", skip: Sequence[str] = ()) -> Iterator[Key]:
    """Yields the keys of a dataclass and of those in it, in the order of the fields.

    Args:
        schema: The dataclass.
        at: Path of the dataclass in the tree.
        skip: Paths that are left out: groups, whose keys their options have.
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
    """Whether a key is of a path in which `NAME` stands for any name."""
    path, given = template.split("."), key.split(".")
    return len(path) == len(given) and all(a in (NAME, b) for a, b in zip(path, given, strict=True))


def _not_null(hint: Any) -> Any:
    """The type without null."""
    if get_origin(hint) in (Union, types.UnionType):
        left = [part for part in get_args(hint) if part is not type(None)]
        return left[0] if len(left) == 1 else hint
    return hint


def _about(schema: type) -> dict[str, str]:
    """What the `Attributes:` sections of a dataclass and of its bases say of each field."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        section = re.search(r"^Attributes:\n((?: .*\n?|\n)+)", inspect.getdoc(base) or "", re.M)
        if section and "__dataclass_fields__" in vars(base):
            entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1], re.M)
            found |= {name: " ".join(text.split()) for name, text in entries}
    return found
