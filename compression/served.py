"""The type of numbers that an artifact is computed in where it is served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AUTO = "auto"


def served_dtype(config: Mapping[str, Any], has_gpu: bool, asked: str = AUTO) -> str:
    """Names the type that a model is loaded and computed in.

    On a GPU it is the one that `config.json` names. On a CPU it is float32, for artifacts of every
    format: most CPUs are slower in bfloat16, and lose digits for nothing.

    Args:
        config: What the artifact's `config.json` says.
        has_gpu: Whether it is served on one.
        asked: `engine.dtype`; `auto` leaves it to this rule.

    Returns:
        `float32`, `bfloat16` or `float16`, as torch calls them.
    """
    if asked != AUTO:
        return asked
    if not has_gpu:
        return "float32"
    text = config.get("text_config") or {}
    for described in (config, text):
        if (named := described.get("dtype") or described.get("torch_dtype")) is not None:
            return str(named).removeprefix("torch.")
    return "float32"
