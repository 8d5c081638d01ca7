"""Losses that should not be learned from: not a number, or far above those before."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from enum import Enum

from core.errors import ConfigError
from core.settings.rules import setting

_WINDOW = 100
_FEWEST = 20  # losses before a spike can be told from the start of training


class AnomalyAction(Enum):
    """What to do about one."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


@dataclass
class AnomalyConfig:
    """What to do when a loss or a gradient is not finite, or a loss leaps.

    Attributes:
        action: What an anomaly does to the run: `stop` ends it with an error and keeps the last
            good checkpoint; it looks when the loss is logged or saved. `skip` updates nothing and
            goes on with the next batch. `rollback` goes back to the last good checkpoint and on
            with the batches after this one (as in Chowdhery et al. 2022, "PaLM", 5.1). Both look at
            every step, which waits for the device once a step.
        loss_spike: Robust standard deviations above the median of the last 100 losses that make a
            spike, e.g. 10; null minds only losses and gradients that are not finite.
        max_in_a_row: Anomalies without a good step between them after which the run fails.
    """

    action: AnomalyAction = AnomalyAction.stop
    loss_spike: float | None = setting(None, above=0, fix="use 10, or null")
    max_in_a_row: int = setting(3, above=0, fix="use 3")

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for a bound on losses that nothing would look at."""
        if self.loss_spike is not None and self.action is AnomalyAction.stop:
            raise ConfigError(
                f"{key}.loss_spike",
                self.loss_spike,
                f"has no effect with {key}.action=stop, which does not look at every loss",
                f"set {key}.action=skip or rollback",
            )


class LossWatch:
    """Judges one loss after another; the same on every rank, since all see the global loss."""

    def __init__(self, config: AnomalyConfig) -> None:
        self._threshold = config.loss_spike
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def verdict(self, loss: float) -> str | None:
        """What is wrong with a loss, or None; one that is well is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._threshold is not None and len(self._losses) >= _FEWEST:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(x - median) for x in self._losses)
            # 1.4826: the median deviation of a normal distribution in standard deviations
            limit = median + self._threshold * 1.4826 * max(deviation, 1e-3 * abs(median))
            if loss > limit:
                return f"the loss leapt to {loss:.4g} (median {median:.4g}, limit {limit:.4g})"
        self._losses.append(loss)
        return None
