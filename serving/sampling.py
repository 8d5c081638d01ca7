"""How a token is chosen among the likely ones, and what a model's author says of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from serving.artifact import read_object

_RANGES = {  # least and most
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


@dataclass(frozen=True)
class Choice:
    """Settings that are applied in the order of transformers' logits processors.

    Attributes:
        repetition_penalty: Logits of tokens that prompt or answer have are divided by it where they
            are positive, and multiplied by it where not; 1: nothing happens.
        temperature: 0: the likeliest token.
        top_k: Only so many of the likeliest tokens; 0: all.
        top_p: The likeliest tokens that together have it, in (0, 1].
        min_p: Tokens with at least this share of the likeliest one's probability, in [0, 1].
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def but(self, asked: Mapping[str, float | None]) -> Choice:
        """With what a request asks for; None: it asks for nothing."""
        given: dict[str, Any] = {name: x for name, x in asked.items() if x is not None}
        return dataclasses.replace(self, **given)

    def extras(self) -> list[str]:
        """The settings that change something and that not every engine has."""
        neutral = Choice()
        names = ("top_k", "min_p", "repetition_penalty")
        return [name for name in names if getattr(self, name) != getattr(neutral, name)]

    @property
    def is_models_own(self) -> bool:
        """Whether the token is the likeliest of the model's own distribution, or drawn from it."""
        if self.repetition_penalty != 1:
            return False
        is_whole = self.temperature == 1 and self.top_p == 1 and not self.top_k and not self.min_p
        return self.temperature == 0 or is_whole


def defaults_of(folder: Path) -> Choice:
    """What a model's `generation_config.json` says, where a request does not.

    Args:
        folder: Of the artifact.

    Raises:
        ConfigError: It says what cannot be.
    """
    path = folder / "generation_config.json"
    found = read_object(path) if path.is_file() else {}
    asked: dict[str, Any] = {}
    for name, (least, most) in _RANGES.items():
        if (value := found.get(name)) is None:
            continue
        kinds = int if name == "top_k" else (int, float)
        is_one = isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
        if not is_one or value == math.inf or (name == "top_p" and value == 0):
            rule = f"{path} says {name}={value!r}, which cannot be"
            fix = "mend it, or set generation_config=vllm"
            raise ConfigError("generation_config", "auto", rule, fix)
        asked[name] = max(value, 0)
    return Choice().but(asked)
