"""Rules for the values of settings: a field carries its own, and one function checks them all.

A rule is in the field's metadata, which OmegaConf passes over. What several fields must keep
together is said by the dataclass's method `cross_check(key)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

from core.errors import ConfigError

_RULE = "rule"


@dataclass(frozen=True)
class _Rule:
    """See `setting`, whose arguments these are."""

    above: float | None
    least: float | None
    most: float | None
    below: float | None
    choices: Sequence[Any]
    check: Callable[[str, Any], object] | None
    fix: str

    def apply(self, key: str, value: Any) -> None:
        """Raises ConfigError for a value that breaks the rule."""
        if not self._holds(value):
            shown = repr(value) if value == "" else value
            raise ConfigError(key, shown, f"must be {self._text()}", self.fix)
        if self.check is not None:
            self.check(key, value)

    def _holds(self, value: Any) -> bool:
        # Every comparison is one that NaN fails.
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (not self.choices or value in self.choices)
        )

    def _text(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.least is not None and self.most is not None:
            return f"from {self.least:g} to {self.most:g}"
        parts = {
            "above": self.above,
            "at least": self.least,
            "at most": self.most,
            "below": self.below,
        }
        texts = [
            "finite" if value == math.inf else f"{words} {value:g}"
            for words, value in parts.items()
            if value is not None
        ]
        return " and ".join(texts)


def setting(
    default: Any = None,
    *,
    factory: Callable[[], Any] | None = None,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] = (),
    check: Callable[[str, Any], object] | None = None,
    fix: str = "choose another value",
) -> Any:
    """Returns a field of a settings dataclass whose value keeps a rule.

    The rule holds for each item of a list and each value of a dict; null keeps every rule.

    Args:
        default: Value of the field where nothing sets it; `MISSING` where something has to.
        factory: Makes the default instead, for lists and dicts.
        above: Bound that a value exceeds; NaN breaks every bound.
        least: Smallest value.
        most: Largest value.
        below: Bound that a value stays under; `math.inf` means any finite number.
        choices: The only values.
        check: Called with key and value; raises ConfigError for a value that cannot be.
        fix: What the error advises.
    """
    rule = _Rule(above, least, most, below, choices, check, fix)
    if factory is not None:
        return field(default_factory=factory, metadata={_RULE: rule})
    return field(default=default, metadata={_RULE: rule})


@runtime_checkable
class CrossChecked(Protocol):
    """A dataclass whose fields must keep something together."""

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for values that cannot hold together.

        Args:
            key: Where the dataclass stands in the tree, e.g. `parallel`; empty at the root.
        """
        ...


def check_settings(config: Any, key: str = "") -> None:
    """Raises ConfigError for the first setting in a tree that is unknown or breaks a rule.

    Args:
        config: A settings dataclass, or a dict of them.
        key: Where it stands in the tree; empty at the root.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            check_settings(value, join(key, name))
    if not is_dataclass(config):
        return
    known = {f.name: f for f in fields(config)}
    for name, value in vars(config).items():
        here = join(key, name)
        if name not in known:  # `+key=value` adds it
            rule = "there is no such key, and nothing would read it"
            raise ConfigError(here, value, rule, "remove it")
        _check_value(known[name], here, value)
        check_settings(value, here)
    if isinstance(config, CrossChecked):
        config.cross_check(key)


def join(key: str, name: object) -> str:
    """Returns the dotted key of `name` below `key`."""
    return f"{key}.{name}" if key else str(name)


def _check_value(of: Field[Any], key: str, value: Any) -> None:
    rule: _Rule | None = of.metadata.get(_RULE)
    if rule is None:
        return
    if isinstance(value, dict):
        items = [(join(key, name), item) for name, item in value.items()]
    elif isinstance(value, list):
        items = [(key, item) for item in value]
    else:
        items = [(key, value)]
    for where, item in items:
        if item is not None:
            rule.apply(where, item)
