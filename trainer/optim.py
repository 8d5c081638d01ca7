"""The optimizer: AdamW, with decay on what multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from core.settings.rules import setting

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


# Last parts of names of tensors that state-space models hold as matrices and that multiply nothing.
_RATES = ("A_log", "dt_bias")


class Decay(Enum):
    """Which parameters are under weight decay."""

    auto = "auto"
    matrices = "matrices"


@dataclass
class AdamWConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), torch's fused implementation.

    Attributes:
        lr: Peak learning rate; the schedule scales it.
        beta1: Decay of the mean of gradients, for each step.
        beta2: Decay of the mean of their squares, for each step.
        eps: Added to the root of that mean, which keeps the quotient finite.
        weight_decay: Decay of the parameters that `decay` names, relative to the learning rate.
        decay: Parameters that decay: `matrices` are those of two or more dimensions; `auto` leaves
            out those of them that are biases (of experts), norms (of heads) or rates (`A_log`) by
            their names, or that the model marks with `_no_weight_decay`.
        max_norm: Largest global gradient norm; null switches clipping off.
    """

    lr: float = setting(3e-4, above=0, fix="try 3e-4")
    beta1: float = setting(0.9, least=0, below=1, fix="try 0.9")
    beta2: float = setting(0.95, least=0, below=1, fix="try 0.95")
    eps: float = setting(1e-8, above=0, fix="try 1e-8")
    weight_decay: float = setting(0.1, least=0, fix="try 0.1")
    decay: Decay = Decay.auto
    max_norm: float | None = setting(1.0, above=0, fix="null: no clipping")

    def build(self, parameters: dict[str, nn.Parameter], decayed: set[str]) -> Optimizer:
        """Builds the optimizer.

        Args:
            parameters: By canonical name; they may be shards, whose own shapes say nothing.
            decayed: Names of those under weight decay.
        """
        from torch.optim import AdamW

        groups = [
            {
                "params": [p for n, p in parameters.items() if n in decayed],
                "weight_decay": self.weight_decay,
            },
            {
                "params": [p for n, p in parameters.items() if n not in decayed],
                "weight_decay": 0.0,
            },
        ]
        return AdamW(
            [g for g in groups if g["params"]],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )


def decayed_names(model: nn.Module, decay: Decay) -> set[str]:
    """Names of the parameters of `model` that are under weight decay.

    Args:
        model: As transformers built it: its marks are on the parameters that it made.
        decay: The rule.
    """
    matrices = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    if decay is Decay.matrices:
        return set(matrices)
    return {
        name
        for name, parameter in matrices.items()
        if not getattr(parameter, "_no_weight_decay", False) and _multiplies(name)
    }


def _multiplies(name: str) -> bool:
    *_, owner, leaf = f".{name}".split(".")
    return not (leaf in _RATES or leaf.endswith("bias") or owner.lower().endswith("norm"))
