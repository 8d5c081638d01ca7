"""Learning-rate schedules: pure functions of the step, so a resume needs no state."""

import math
from dataclasses import dataclass

from core.errors import ConfigError
from core.settings.rules import setting


@dataclass
class CosineConfig:
    """Linear warm-up, then half a cosine down to `min_lr_ratio` (arXiv 1608.03983).

    Attributes:
        warmup_steps: Steps from 0 to the peak.
        min_lr_ratio: Learning rate at the last step, relative to the peak.
    """

    warmup_steps: int = setting(100, least=0, fix="0: no warm-up")
    min_lr_ratio: float = setting(0.1, least=0, most=1, fix="try 0.1")

    def check(self, total_steps: int | None) -> int | None:
        """Number of steps that the shape depends on; ConfigError where it is not known."""
        return _known(total_steps, "cosine", warmup_steps=self.warmup_steps)

    def scale(self, step: int, total_steps: int | None) -> float:
        """Factor on the peak learning rate at `step` (0-based)."""
        assert total_steps is not None
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - 1 - self.warmup_steps)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (
            1 + math.cos(math.pi * progress)
        )


@dataclass
class WarmupStableDecayConfig:
    """Linear warm-up, a constant stretch, and a linear decay at the end (arXiv 2404.06395).

    Attributes:
        warmup_steps: Steps from 0 to the peak.
        decay_steps: Steps from the peak down to `min_lr_ratio`.
        min_lr_ratio: Learning rate at the last step, relative to the peak.
    """

    warmup_steps: int = setting(100, least=0, fix="0: no warm-up")
    decay_steps: int = setting(100, above=0, fix="or use schedule=constant")
    min_lr_ratio: float = setting(0.0, least=0, most=1, fix="try 0.1")

    def check(self, total_steps: int | None) -> int | None:
        """Number of steps that the shape depends on; ConfigError where it is not known."""
        return _known(
            total_steps, "wsd", warmup_steps=self.warmup_steps, decay_steps=self.decay_steps
        )

    def scale(self, step: int, total_steps: int | None) -> float:
        """Factor on the peak learning rate at `step` (0-based)."""
        assert total_steps is not None
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = total_steps - 1 - step
        if left >= self.decay_steps:
            return 1.0
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * left / self.decay_steps


@dataclass
class ConstantConfig:
    """Linear warm-up, then the peak learning rate for as long as the run goes.

    Attributes:
        warmup_steps: Steps from 0 to the peak.
    """

    warmup_steps: int = setting(100, least=0, fix="0: no warm-up")

    def check(self, total_steps: int | None) -> int | None:
        """Nothing depends on the length of the run: it may end by the clock, or be extended."""
        return None

    def scale(self, step: int, total_steps: int | None) -> float:
        """Factor on the peak learning rate at `step` (0-based)."""
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0


ScheduleConfig = CosineConfig | WarmupStableDecayConfig | ConstantConfig


def _known(total_steps: int | None, name: str, **parts: int) -> int:
    if total_steps is None:
        raise ConfigError(
            "schedule",
            name,
            "its shape depends on the length of the run, and only stop.minutes is set",
            "set stop.steps or stop.tokens too, or use schedule=constant",
        )
    if sum(parts.values()) >= total_steps:
        raise ConfigError(
            " + ".join(f"schedule.{part}" for part in parts),
            sum(parts.values()),
            f"must be shorter than the run of {total_steps} steps",
            "lower it, or raise stop.steps",
        )
    return total_steps
