"""Splits the fused experts of a mixture of experts into one linear layer for each matrix.

transformers 5 keeps the experts of a layer as two parameters, `gate_up_proj` (E, 2F, H) or
`up_proj` (E, F, H), and `down_proj` (E, H, F), which are not linear layers. Compression methods
work on matrices: each expert gets linear layers that are views of the fused parameters, with the
names that most checkpoints use (`mlp.experts.3.gate_proj`).

Shapes: E experts, N tokens, K experts of a token, H hidden size, F width of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

_GATE, _UP, _DOWN = "gate_proj", "up_proj", "down_proj"
_NAME = re.compile(rf"(.+)\.(\d+)\.({_GATE}|{_UP}|{_DOWN})\.weight")


class Expert(nn.Module):
    """The linear layers of one expert.

    Attributes:
        gate_proj: Linear layer (F, H); None if an activation alone follows `up_proj`.
        up_proj: Linear layer (F, H).
        down_proj: Linear layer (H, F).
    """

    def __init__(self, fused: Any, index: int) -> None:
        super().__init__()
        first = fused.gate_up_proj[index] if fused.has_gate else fused.up_proj[index]
        parts = first.chunk(2) if fused.has_gate else (first,)
        self.gate_proj = _linear(parts[0]) if fused.has_gate else None
        self.up_proj = _linear(parts[-1])
        self.down_proj = _linear(fused.down_proj[index])


class SplitExperts(nn.ModuleList):
    """Replaces a fused module by a list of experts, and computes the same.

    Attributes:
        scales_through: True if an expert's output is linear in the output of `up_proj`.

    Args:
        fused: Module of a class with transformers' experts implementation; see `can_split`.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__(Expert(fused, index) for index in range(fused.num_experts))
        self._finish = fused._apply_gate if fused.has_gate else fused.act_fn
        # Only the default gate, act(gate) * up, is known to be linear in `up`.
        is_default = type(fused)._apply_gate is moe._default_apply_gate
        self.scales_through = fused.has_gate and is_default

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the experts' output (N, H).

        Args:
            hidden_states: Input (N, H).
            top_k_index: Experts of each token (N, K).
            top_k_weights: Weights of these experts (N, K).
        """
        result = torch.zeros_like(hidden_states)
        expert: Any
        for index, expert in enumerate(self):
            # Loops over experts, not tokens, so that each matrix multiplies all its rows at once.
            rows, places = torch.where(top_k_index == index)
            if not len(rows):
                continue
            given = hidden_states[rows]
            made = expert.up_proj(given)
            if expert.gate_proj is not None:
                made = torch.cat([expert.gate_proj(given), made], -1)
            made = expert.down_proj(self._finish(made))
            result.index_add_(0, rows, made * top_k_weights[rows, places, None])
        return result


def is_fused(module: nn.Module) -> bool:
    """Returns whether a module holds the matrices of several experts in one parameter."""
    return any(
        name.endswith("proj") and parameter.ndim == 3
        for name, parameter in module.named_parameters(recurse=False)
    )


def can_split(module: Any) -> bool:
    """Returns whether `SplitExperts` can replace a fused module: no biases, not transposed."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return (
        names in ({"gate_up_proj", _DOWN}, {_UP, _DOWN})
        and hasattr(module, "has_gate")
        and module.has_gate == ("gate_up_proj" in names)
        and not (module.is_transposed or module.has_bias or module.has_post_expert_norm)
        and module.is_concatenated
        and not list(module.named_parameters())[2:]
    )


def split_experts(block: nn.Module) -> None:
    """Replaces each fused module of a block that can be split by `SplitExperts`."""
    for name, module in list(block.named_modules()):
        if is_fused(module) and can_split(module):
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, SplitExperts(module))


def parse_name(weight: str) -> tuple[str, int, str] | None:
    """Returns fused module, number and matrix of an expert's weight name; None for other names."""
    found = _NAME.fullmatch(weight)
    return None if found is None else (found[1], int(found[2]), found[3])


def fuse(values: Mapping[str, Tensor], modules: Collection[str]) -> dict[str, Tensor]:
    """Returns tensors by name, with the experts fused as transformers has them in memory.

    Args:
        values: Tensors by name, with all matrices of a layer's experts or none of them.
        modules: Names of the fused modules.
    """
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}
    rest = {}
    for name, value in values.items():
        parsed = parse_name(name)
        if parsed is None or parsed[0] not in modules:
            rest[name] = value
            continue
        module, index, which = parsed
        experts.setdefault(module, {}).setdefault(which, {})[index] = value
    for module, found in experts.items():
        stacked = {
            which: torch.stack([by_index[i] for i in range(len(by_index))])
            for which, by_index in found.items()
        }
        # transformers concatenates both along the outputs (E, 2F, H), gates first.
        if _GATE in stacked:
            stacked["gate_up_proj"] = torch.cat([stacked.pop(_GATE), stacked.pop(_UP)], 1)
        rest |= {f"{module}.{which}": tensor for which, tensor in stacked.items()}
    return rest


def _linear(weight: Tensor) -> nn.Linear:
    """Returns a layer without a bias that shares the memory of a matrix."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer
