"""Chooses the layers that get more bits: those that reduce the KL most for what their bits cost.

Each part of each block is rounded to few bits by itself, and the change of the model's next-token
distribution is measured, all in one pass over the blocks: each part has hidden states of its own,
which are the parent's up to its block. P parts of L blocks run P * L / 2 blocks on the samples,
and the head P times.

Shapes: N samples of T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compression.hidden import Hidden, embed
from compression.progress import Advance
from compression.quantizer import fit_grid
from compression.recipe import MixedConfig
from compression.scheme import Scheme
from compression.stream import BlockStream
from core.errors import ConfigError

if TYPE_CHECKING:
    from compression.decode_cost import DecodeCost

Parts = Mapping[str, list[str]]  # name of a part -> full names of its layers

# Engines fuse these layers into one matrix, so that they must have the same bits: vLLM's
# `packed_modules_mapping`.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def parts_of(layers: Mapping[str, int]) -> dict[str, list[str]]:
    """Returns the layers that are judged together: one, or those that engines fuse into one."""
    parts: dict[str, list[str]] = {}
    for name in layers:
        parts.setdefault(part_of(name), []).append(name)
    return parts


def part_of(layer: str) -> str:
    """Returns the name of the part that a layer belongs to, such as `mlp.gate_up_proj`."""
    module, _, name = layer.rpartition(".")
    return f"{module}.{_FUSED.get(name, name)}"


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
    """Returns the KL from the parent, in nats a token, if one part alone is rounded, for each part.

    Args:
        stream: Stream of the parent, with no block read yet.
        layers: Names of the layers, with the number of their block.
        scheme: Scheme to which a part is rounded.
        dtype: Type of scales.
        input_ids: Token ids (N, T) int64.
        folder: Folder for hidden states, with one file for each part.
        advance: Called with the number of blocks that are done, and their total.
    """
    parts, num_blocks = parts_of(layers), len(stream.blocks)
    advance(0, num_blocks)
    stream.load_embedding()
    width = stream.model.config.get_text_config().hidden_size
    parent = embed(input_ids, stream.embed, folder / "parent-0", width)
    rounded: dict[str, Hidden] = {}
    for index in range(num_blocks):
        stream.load(index)
        modules = stream.layers(index)
        run = partial(stream.run, index)
        # Parts that were rounded in earlier blocks go through this block as it is.
        for part, hidden in rounded.items():
            rounded[part] = _moved(hidden, run, folder / f"{part}-{index + 1}")
        for part, names in parts.items():
            # A part of this block branches off the parent's hidden states here.
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
    """Returns (outputs, inputs) of each layer."""
    chosen = stream.chosen(layers)
    return {name: (layer.out_features, layer.in_features) for name, layer in chosen.items()}


def check_budget(
    step: MixedConfig, key: str, shapes: Mapping[str, tuple[int, int]], scale_bytes: int
) -> None:
    """Raises ConfigError for a budget of bytes that nothing fits; see `choose_schemes`."""
    if step.budget_tokens_per_s is not None:
        return  # a budget of speed cannot be judged without a measurement
    # Any KL will do: the smallest size does not depend on it.
    nothing_known = dict.fromkeys(parts_of(dict.fromkeys(shapes, 0)), 0.0)
    choose_schemes(step, key, nothing_known, shapes, scale_bytes)


def choose_schemes(
    step: MixedConfig,
    key: str,
    kl: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    scale_bytes: int,
    cost: DecodeCost | None = None,
) -> dict[str, Scheme]:
    """Returns the scheme of each layer: more bits where they reduce the KL most for their cost.

    The cost is in bytes; for a budget of tokens/s it is in milliseconds.

    Args:
        step: Settings of the step, with the budget.
        key: Key of the step, for errors.
        kl: KL of each part, see `measure_kl`.
        shapes: Outputs and inputs of each layer, see `shapes_of`.
        scale_bytes: Bytes of a scale.
        cost: Measured decoding times, for a budget of tokens/s.

    Raises:
        ConfigError: Even the smallest, or fastest, assignment exceeds the budget.
    """
    low, high = step.schemes()
    parts = parts_of(dict.fromkeys(shapes, 0))
    if step.budget_tokens_per_s is not None:
        assert cost is not None
        costs = {part: cost.added_ms(names) for part, names in parts.items()}
        cost.check(step, key, costs)
        left = 1000 / step.budget_tokens_per_s - cost.least_ms(costs)
        return _spend(left, costs, kl, parts, low, high)

    def size(names: list[str], scheme: Scheme) -> float:
        return sum(scheme.bytes_of(*shapes[name], scale_bytes) for name in names)

    every = list(shapes)
    num_weights = sum(outputs * inputs for outputs, inputs in shapes.values())
    setting, value, unit = "budget_mb", step.budget_mb, 1e6
    if step.budget_bits is not None:
        setting, value, unit = "budget_bits", step.budget_bits, num_weights / 8
    assert value is not None
    left = value * unit - size(every, low)
    if not left >= 0:  # written so that NaN is refused as well
        least = size(every, low) / unit
        rule = f"{step.bits} bits everywhere, with their scales, take {least:.4g}"
        raise ConfigError(f"{key}.{setting}", value, rule, "raise the budget, or lower bits")
    costs = {part: size(names, high) - size(names, low) for part, names in parts.items()}
    return _spend(left, costs, kl, parts, low, high)


def _spend(
    left: float,
    costs: Mapping[str, float],
    kl: Mapping[str, float],
    parts: Parts,
    low: Scheme,
    high: Scheme,
) -> dict[str, Scheme]:
    """Gives more bits to parts that get no slower or larger, then to those with most KL for a cost.

    A part that the rest of the budget cannot pay is passed over for cheaper ones.
    """
    chosen = {name: low for names in parts.values() for name in names}
    pays = {part: kl[part] / cost if cost > 0 else math.inf for part, cost in costs.items()}
    for part in sorted(parts, key=lambda part: pays[part], reverse=True):
        cost = max(0.0, costs[part])
        if cost <= left:
            left -= cost
            chosen |= dict.fromkeys(parts[part], high)
    return chosen


def describe(kl: Mapping[str, float], schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Returns the KL with few bits and the chosen bits of each part, for the report."""
    bits = {part_of(name): scheme.bits for name, scheme in schemes.items()}
    return {part: {"kl_nats": value, "bits": bits[part]} for part, value in kl.items()}


def _moved(hidden: Hidden, run: Any, path: Path) -> Hidden:
    following = hidden.map(run, path)
    hidden.path.unlink()
    return following
