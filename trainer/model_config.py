"""Settings of models. Imports no torch, because `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from core.errors import ConfigError
from trainer.data.config import expanded


@dataclass
class ModelConfig:
    """Configures what all kinds of models have in common.

    Attributes:
        attn_implementation: Transformers' name of the attention kernel; null: transformers chooses.
        fused_loss: Fusion of head and cross-entropy, computed in chunks, so that the logits of a
            batch are never stored: `auto` fuses if the model's logits are the product of its hidden
            states and its head, which is tested before the first step; `true` refuses other models;
            `false` lets transformers compute the logits.
    """

    attn_implementation: str | None = "sdpa"
    # The type is Any because OmegaConf would turn true into the text "true" for `str | bool`.
    fused_loss: Any = "auto"

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for an unknown value of `fused_loss`."""
        if not (self.fused_loss == "auto" or isinstance(self.fused_loss, bool)):
            rule = "must be auto, true or false"
            raise ConfigError(f"{key}.fused_loss", self.fused_loss, rule, "use auto")


@dataclass
class NamedModelConfig(ModelConfig):
    """Configures a model described by its config, with random weights (`model=tiny`, ...).

    Attributes:
        model_type: Transformers' name of the architecture, e.g. `llama`.
        vocab_size: Rows of the embedding; null: those of the tokenizer, rounded up to a multiple of
            64.
        config: Further fields of that architecture's transformers config.
    """

    model_type: str = MISSING
    vocab_size: int | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class PathModelConfig(ModelConfig):
    """Configures a model described by a Hugging Face folder or hub name.

    Attributes:
        path: Folder or hub name.
        revision: Commit, tag or branch of a hub repository.
        weights: True loads its weights (`model=pretrained`), false draws random ones
            (`model=config`).
        keep_zeros: True keeps weights of matrices (not of embeddings) that are exactly zero at
            zero, as needed for fine-tuning a pruned model.
    """

    path: str = MISSING
    revision: str | None = None
    weights: bool = True
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        self.path = expanded(self.path)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError also for `keep_zeros` with random weights, which have no zeros."""
        super().cross_check(key)
        if self.keep_zeros and not self.weights:
            rule = "random weights have no zeros to keep"
            fix = "use model=pretrained, or remove it"
            raise ConfigError(f"{key}.keep_zeros", True, rule, fix)
