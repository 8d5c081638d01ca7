"""The number type in which a server loads an artifact and computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AUTO = "auto"


def served_dtype(config: Mapping[str, Any], has_gpu: bool, asked: str = AUTO) -> str:
    """Returns the number type in which a model is loaded and computed.

    A GPU uses the type that `config.json` names. A CPU uses float32 for artifacts of every format:
    most CPUs are slower in bfloat16, which is also less exact.

    Args:
        config: Content of the artifact's `config.json`.
        has_gpu: True if the artifact is served on a GPU.
        asked: Value of `engine.dtype`; `auto` applies this rule.

    Returns:
        `float32`, `bfloat16` or `float16`, by torch's names.
    """
    if asked != AUTO:
        return asked
    if not has_gpu:
        return "float32"
    # Models with several parts name the type in the part for text only.
    text = config.get("text_config") or {}
    for described in (config, text):
        if (named := described.get("dtype") or described.get("torch_dtype")) is not None:
            return str(named).removeprefix("torch.")
    return "float32"
