"""Which layers get more bits: those that pay most in KL for what a bit of theirs costs.

Each part of each block (its attention, its MLP) is rounded to few bits by itself, and what that
does to the model's next-token distribution is measured, all in one walk over the blocks: every
part has a stream of hidden states of its own, which is the parent's as far as its block.

Shapes: N samples of T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.grid import fit_grid
from compression.hidden import Hidden, embed
from compression.progress import Advance
from compression.recipe import MixedConfig
from compression.scheme import Scheme
from compression.stream import BlockStream
from monitoring.errors import ConfigError

Parts = Mapping[str, list[str]]  # a part's name -> its layers' full names


def parts_of(layers: Mapping[str, int]) -> dict[str, list[str]]:
    """Layers that are judged together: those of one module, as `model.layers.0.mlp`."""
    parts: dict[str, list[str]] = {}
    for name in layers:
        parts.setdefault(name.rpartition(".")[0], []).append(name)
    return parts


@torch.no_grad()
def measure_kl(
    stream: BlockStream,
    layers: Mapping[str, int],
    scheme: Scheme,
    dtype: torch.dtype,
    input_ids: Tensor,
    folder: Path,
    advance: Advance,
) -> dict[str, float]:
    """KL from the parent, in nats a token, where one part alone is rounded.

    Args:
        stream: Of the parent, of which no block was read yet.
        layers: With the number of their block.
        scheme: To which they are rounded.
        dtype: Of scales.
        input_ids: (N, T) int64.
        folder: For hidden states, one file a part.
        advance: Told of each block.
    """
    parts, num_blocks = parts_of(layers), len(stream.blocks)
    advance(0, num_blocks)
    stream.load_embedding()
    width = stream.model.config.get_text_config().hidden_size
    parent = embed(input_ids, stream.embed, folder / "parent-0", width)
    rounded: dict[str, Hidden] = {}
    for index in range(num_blocks):
        modules = _linears(stream, index)
        run = partial(stream.run, index)
        for part, hidden in rounded.items():
            rounded[part] = _moved(hidden, run, folder / f"{part}-{index + 1}")
        for part, names in parts.items():
            if layers[names[0]] == index:
                kept = {name: modules[name].weight.data for name in names}
                for name, weight in kept.items():
                    quantized = fit_grid(weight, scheme, dtype).quantize(weight)
                    modules[name].weight.data = quantized.dequantize()
                rounded[part] = parent.map(run, folder / f"{part}-{index + 1}")
                for name, weight in kept.items():
                    modules[name].weight.data = weight
        parent = _moved(parent, run, folder / f"parent-{index + 1}")
        stream.release(index)
        advance(index + 1, num_blocks)
    stream.load_head()
    sums = dict.fromkeys(rounded, 0.0)
    streams = zip(parent.batches(), *(h.batches() for h in rounded.values()), strict=True)
    num_tokens = 0
    for batch, *others in streams:
        for row in range(len(batch)):
            log_p = stream.logits(batch[row : row + 1])[0].log_softmax(-1)  # (T, V)
            num_tokens += len(log_p)
            for part, other in zip(rounded, others, strict=True):
                log_q = stream.logits(other[row : row + 1])[0].log_softmax(-1)
                sums[part] += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return {part: total / num_tokens for part, total in sums.items()}


def shapes_of(stream: BlockStream, layers: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each layer."""
    modules = dict(stream.model.named_modules())
    return {name: (modules[name].out_features, modules[name].in_features) for name in layers}


def check_budget(
    step: MixedConfig, key: str, shapes: Mapping[str, tuple[int, int]], scale_bytes: int
) -> None:
    """Raises ConfigError for a budget that nothing fits; see `choose_schemes`."""
    nothing_known = dict.fromkeys(parts_of(dict.fromkeys(shapes, 0)), 0.0)
    choose_schemes(step, key, nothing_known, shapes, scale_bytes)


def choose_schemes(
    step: MixedConfig,
    key: str,
    kl: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    scale_bytes: int,
) -> dict[str, Scheme]:
    """Of each layer: more bits for the parts that pay most KL for a byte, as the budget goes.

    Args:
        step: With the budget.
        key: The step's, for errors.
        kl: See `measure_kl`.
        shapes: See `shapes_of`.
        scale_bytes: Of a scale.

    Raises:
        ConfigError: Even few bits everywhere are above the budget.
    """
    low, high = step.schemes(key)
    parts = parts_of(dict.fromkeys(shapes, 0))

    def size(names: list[str], scheme: Scheme) -> float:
        return sum(scheme.bytes_of(*shapes[name], scale_bytes) for name in names)

    every = list(shapes)
    num_weights = sum(outputs * inputs for outputs, inputs in shapes.values())
    setting, value, unit = "budget_mb", step.budget_mb, 1e6
    if step.budget_bits is not None:
        setting, value, unit = "budget_bits", step.budget_bits, num_weights / 8
    assert value is not None
    left = value * unit - size(every, low)
    if not left >= 0:  # NaN, too
        least = size(every, low) / unit
        rule = f"{step.bits} bits everywhere, with their scales, take {least:.4g}"
        raise ConfigError(f"{key}.{setting}", value, rule, "raise it, or lower bits")
    costs = {part: size(names, high) - size(names, low) for part, names in parts.items()}
    chosen = dict.fromkeys(every, low)
    for part in sorted(parts, key=lambda part: kl[part] / costs[part], reverse=True):
        if costs[part] <= left:
            left -= costs[part]
            chosen |= dict.fromkeys(parts[part], high)
    return chosen


def describe(kl: Mapping[str, float], schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """For the report: of each part, the KL of few bits and the bits that it got."""
    bits = {name.rpartition(".")[0]: scheme.bits for name, scheme in schemes.items()}
    return {part: {"kl_nats": value, "bits": bits[part]} for part, value in kl.items()}


def _moved(hidden: Hidden, run: Any, path: Path) -> Hidden:
    following = hidden.map(run, path)
    hidden.path.unlink()
    return following


def _linears(stream: BlockStream, index: int) -> dict[str, nn.Linear]:
    block = stream.load(index)
    return {
        f"{stream.names[index]}.{name}": module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
