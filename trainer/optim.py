"""The optimizer: AdamW, with weight decay on weights that multiply."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from core.settings.rules import setting
from parallel.optimizer_state import ADAMW, OptimizerState

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


# Last parts of names of tensors that state-space models store as matrices but do not multiply with.
_RATES = ("A_log", "dt_bias")


class Decay(Enum):
    """Lists the rules that select parameters for weight decay."""

    auto = "auto"
    matrices = "matrices"


@dataclass
class AdamWConfig:
    """Configures AdamW (Loshchilov & Hutter, arXiv 1711.05101), in torch's fused implementation.

    Attributes:
        lr: Peak learning rate, which the schedule scales.
        beta1: Decay of the running mean of gradients, per step.
        beta2: Decay of the running mean of squared gradients, per step.
        eps: Constant added to the root of that mean, which keeps the quotient finite.
        weight_decay: Decay of the parameters that `decay` selects, relative to the learning rate.
        decay: Rule that selects decayed parameters: `matrices` takes those of two or more
            dimensions; `auto` excludes those that are biases (of experts), norms (of heads) or
            rates (`A_log`) by their names, or that the model marks with `_no_weight_decay`.
        max_norm: Largest global gradient norm; null disables clipping.
    """

    lr: float = setting(3e-4, above=0, fix="try 3e-4")
    beta1: float = setting(0.9, least=0, below=1, fix="try 0.9")
    beta2: float = setting(0.95, least=0, below=1, fix="try 0.95")
    eps: float = setting(1e-8, above=0, fix="try 1e-8")
    weight_decay: float = setting(0.1, least=0, fix="try 0.1")
    decay: Decay = Decay.auto
    max_norm: float | None = setting(1.0, above=0, fix="null: no clipping")

    state: ClassVar[OptimizerState] = ADAMW

    def build(self, parameters: dict[str, nn.Parameter], decayed: set[str]) -> Optimizer:
        """Builds the optimizer.

        Args:
            parameters: Parameters by canonical name; they may be shards, whose shapes are not
                global.
            decayed: Names of the parameters under weight decay.
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
        # Fused: one kernel updates many parameters, where launches take longer than arithmetic.
        return AdamW(
            [g for g in groups if g["params"]],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )


def decayed_names(model: nn.Module, decay: Decay) -> set[str]:
    """Returns the names of the parameters of `model` that are under weight decay.

    Args:
        model: Model as transformers built it: its marks are on the original parameters.
        decay: Rule that selects them.
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
