"""Makes a model itself smaller: fewer heads, MLP and hidden channels, blocks.

First the parent runs, a block at a time, and what each part does is measured (`measure.py`). Then
the blocks that stay are read again, cut (`cut.py`), and what is left makes up for the rest
(`refit.py`). Memory holds a block and a Gram matrix.

Shapes: N samples of T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.artifact import claim
from compression.progress import Advance
from compression.recipe import StructuredPruneConfig
from compression.result import Result
from compression.source import Source
from compression.stream import BlockStream
from compression.structured.cut import cut
from compression.structured.family import check_buildable, per_layer, recognize
from compression.structured.measure import measure
from compression.structured.plan import Plan, most_important
from compression.structured.sizes import target_shape
from compression.targets import huggingface
from core.errors import ConfigError, Interrupted
from core.folder import staged_folder
from core.settings.rules import check_settings

KEY = "recipe.prune_structured"


def prune_structured(
    source: Path,
    out: Path,
    config: StructuredPruneConfig,
    calibration: Tensor,
    work: Path,
    advance: Advance,
    stop_requested: Callable[[], bool] = lambda: False,
    key: str = KEY,
) -> dict[str, Any]:
    """Writes a smaller model, which AutoModelForCausalLM loads as it stands.

    Args:
        source: A dense Hugging Face folder; the child's weights are of its type.
        out: Folder to write; it is there only when it is whole.
        config: What goes.
        calibration: Token ids (N, T) int64.
        work: An empty folder, or that of the same call that was stopped.
        advance: Told of each block that was measured, and each that was written.
        stop_requested: Asked between blocks.
        key: The step's, for errors.

    Returns:
        What it removed; JSON types only.

    Raises:
        ConfigError: The model is of another family, has no such sizes, or `out` is there.
        Interrupted: Told to stop; the same call goes on.
    """
    # 1. What can be refused is refused before any work
    plan, stream = _plan(source, out, config, work, key)
    claim(work, _made_from(plan, calibration))
    parent, child = plan.family.shape, plan.shape
    total = parent.blocks + child.blocks

    def done(blocks: int) -> None:
        advance(blocks, total)
        if blocks < total and stop_requested():
            raise Interrupted(f"stopped after {blocks} of {total} blocks; the same call goes on")

    # 2. Look at the parent, choose what all blocks share, cut one after another
    measure(plan, stream, calibration, done)
    del stream
    every = range(parent.blocks)
    depth = torch.stack([plan.score(i, "depth") for i in every])
    hidden = torch.stack([plan.score(i, "hidden") for i in every]).sum(0)
    blocks = most_important(depth, child.blocks).tolist()
    dtype = _dtype(source)
    result = Result(work, dtype, dtype)
    cut(
        plan,
        result,
        calibration,
        blocks,
        most_important(hidden, child.hidden),
        lambda count: done(parent.blocks + count),
    )

    # 3. An ordinary folder, at once
    with staged_folder(out) as staging:
        huggingface.pack(result, source, staging)
        _write_config(plan, staging / "config.json", blocks)
    return _describe(plan, blocks, depth)


def check(source: Path, config: StructuredPruneConfig, key: str = KEY) -> None:
    """Raises ConfigError for what `prune_structured` would refuse, without any work.

    Args:
        source: A dense Hugging Face folder.
        config: What is to go.
        key: The step's, for errors.
    """
    _plan(source, None, config, source, key)


def _plan(
    source: Path, out: Path | None, config: StructuredPruneConfig, work: Path, key: str
) -> tuple[Plan, BlockStream]:
    check_settings(config, key)
    if out is not None and out.exists():
        raise ConfigError("out", out, "is there already", "choose another folder")
    stream = BlockStream(source)
    family = recognize(stream)
    shape = target_shape(config, family, key)
    check_buildable(stream, family, shape, key)
    return Plan(source, work, config, family, shape, per_layer(stream.model.config)), stream


def _write_config(plan: Plan, path: Path, blocks: list[int]) -> None:
    """Edits a copy of the parent's config.json."""
    config = json.loads(path.read_text(encoding="utf-8")) | plan.shape.config()
    if len(blocks) < plan.family.shape.blocks:
        config |= {name: [value[i] for i in blocks] for name, value in plan.per_layer.items()}
        if "max_window_layers" in config:  # of qwen2: so many blocks see everything
            config["max_window_layers"] = sum(i < config["max_window_layers"] for i in blocks)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _describe(plan: Plan, blocks: list[int], depth: Tensor) -> dict[str, Any]:
    parent, child = plan.family.shape, plan.shape
    before, after = plan.family.num_params(parent), plan.family.num_params(child)
    heads = {i: most_important(plan.score(i, "heads"), child.heads).tolist() for i in blocks}
    return {
        "parent": parent.config(),
        "child": child.config(),
        "parent_num_params": before,
        "num_params": after,
        "removed_share": round(1 - after / before, 4),
        "removed_blocks": sorted(set(range(parent.blocks)) - set(blocks)),
        "block_importance": [round(value, 4) for value in depth.tolist()],
        "kept_heads": {str(i): kept for i, kept in heads.items()},
        "refit": plan.config.refit,
    }


def _made_from(plan: Plan, calibration: Tensor) -> dict[str, Any]:
    return {
        "parent": Source.open(plan.source).digests,
        "config": asdict(plan.config),
        "shape": asdict(plan.shape),
        "calibration": hashlib.sha256(calibration.numpy().tobytes()).hexdigest(),
    }


def _dtype(source: Path) -> torch.dtype:
    """In which the parent's weights are loaded."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    assert isinstance(dtype, torch.dtype)
    return dtype
