"""Sampling settings, and the defaults that a model's author gives for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from serving.artifact import read_object

_RANGES = {  # least and greatest value
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings, applied in the order of transformers' logits processors.

    Attributes:
        repetition_penalty: Divisor of the positive logits, and factor of the negative ones, of
            tokens that occur in prompt or answer; 1: no penalty.
        temperature: Divisor of the logits; 0: always the likeliest token.
        top_k: Number of the likeliest tokens that are drawn from; 0: all.
        top_p: Probability mass of the likeliest tokens that are drawn from, in (0, 1].
        min_p: Least probability relative to the likeliest token's, in [0, 1].
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def extras(self) -> list[str]:
        """Returns the names of settings that are in effect and that not every engine supports."""
        neutral = SamplingParams()
        names = ("top_k", "min_p", "repetition_penalty")
        return [name for name in names if getattr(self, name) != getattr(neutral, name)]

    @property
    def is_models_own(self) -> bool:
        """True if tokens are the likeliest of, or drawn from, the model's own distribution."""
        if self.repetition_penalty != 1:
            return False
        is_whole = self.temperature == 1 and self.top_p == 1 and not self.top_k and not self.min_p
        return self.temperature == 0 or is_whole


def defaults_of(folder: Path) -> SamplingParams:
    """Returns the sampling settings of a model's `generation_config.json`.

    Args:
        folder: Folder of the artifact.

    Raises:
        ConfigError: A value is outside of its range.
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
            rule = f"{path} says {name}={value!r}, which is out of range"
            fix = "correct the file, or set generation_config=vllm"
            raise ConfigError("generation_config", "auto", rule, fix)
        asked[name] = max(value, 0)  # top_k=-1 means the same as 0: all tokens
    return SamplingParams(**asked)
