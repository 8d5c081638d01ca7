"""The optimizer: AdamW with decay on matrices only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from monitoring.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass
class AdamWConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), torch's fused implementation.

    Attributes:
        lr: Peak learning rate; the schedule scales it.
        weight_decay: Applied to parameters of two or more dimensions; norms and biases have none.
        max_norm: Largest global gradient norm; null switches clipping off.
    """

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        # "not >" rather than "<=": NaN fails too.
        if not self.lr > 0:
            raise ConfigError("optim.lr", self.lr, "must be above 0", "try 3e-4")
        if not self.eps > 0:
            raise ConfigError("optim.eps", self.eps, "must be above 0", "try 1e-8")
        if not self.weight_decay >= 0:
            raise ConfigError(
                "optim.weight_decay", self.weight_decay, "must not be below 0", "try 0.1"
            )
        for key, beta in (("optim.beta1", self.beta1), ("optim.beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ConfigError(key, beta, "must be in [0, 1)", "try 0.9 and 0.95")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ConfigError(
                "optim.max_norm", self.max_norm, "must be above 0", "null: no clipping"
            )

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
