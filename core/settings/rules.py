"""Rules for the values of settings: each field carries its own, and one function checks them all.

A rule is stored in the field's metadata, which OmegaConf ignores. Rules that involve several fields
are in the method `cross_check(key)` of the dataclass.
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
    """Holds the arguments of `setting`."""

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
        # All comparisons are False for NaN, so NaN breaks every bound.
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
    """Returns a field of a settings dataclass whose value must keep a rule.

    The rule applies to each item of a list and each value of a dict; null keeps every rule.

    Args:
        default: Default of the field; `MISSING` makes it mandatory.
        factory: Function that makes the default, for lists and dicts.
        above: Exclusive lower bound; NaN breaks every bound.
        least: Inclusive lower bound.
        most: Inclusive upper bound.
        below: Exclusive upper bound; `math.inf` allows any finite number.
        choices: The only allowed values.
        check: Function called with key and value; raises ConfigError for an invalid value.
        fix: Advice that the error gives.
    """
    rule = _Rule(above, least, most, below, choices, check, fix)
    if factory is not None:
        return field(default_factory=factory, metadata={_RULE: rule})
    return field(default=default, metadata={_RULE: rule})


@runtime_checkable
class CrossChecked(Protocol):
    """Is implemented by dataclasses with rules that involve several fields."""

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for values that are not valid together.

        Args:
            key: Dotted path of the dataclass in the tree, e.g. `parallel`; empty at the root.
        """
        ...


def check_settings(config: Any, key: str = "") -> None:
    """Raises ConfigError for the first setting in a tree that is unknown or breaks a rule.

    Args:
        config: Settings dataclass, or a dict of them.
        key: Dotted path of `config` in the tree; empty at the root.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            check_settings(value, join(key, name))
    if not is_dataclass(config):
        return
    known = {f.name: f for f in fields(config)}
    for name, value in vars(config).items():
        here = join(key, name)
        if name not in known:  # `+key=value` added it
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
