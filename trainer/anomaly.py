"""Detects losses that should not be learned from: not finite, or far above the previous ones."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from enum import Enum

from core.errors import ConfigError
from core.settings.rules import setting

_WINDOW = 100
_FEWEST = 20  # fewer losses are the start of training, in which a spike cannot be recognized


class AnomalyAction(Enum):
    """Lists the reactions to an anomaly."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


@dataclass
class AnomalyConfig:
    """Configures the reaction to a loss or gradient that is not finite, and to a spike of the loss.

    Attributes:
        action: Reaction to an anomaly: `stop` ends the run with an error and keeps the last good
            checkpoint; losses are checked when they are logged or saved. `skip` skips the update
            and continues with the next batch. `rollback` returns to the last good checkpoint and
            continues with the batches after this one (as in Chowdhery et al. 2022, "PaLM", 5.1).
            `skip` and `rollback` check every step, which waits for the device once a step.
        loss_spike: Threshold of a spike, in robust standard deviations above the median of the last
            100 losses, e.g. 10; null checks only for values that are not finite.
        max_in_a_row: Number of anomalies without a good step between them at which the run fails.
    """

    action: AnomalyAction = AnomalyAction.stop
    loss_spike: float | None = setting(None, above=0, fix="use 10, or null")
    max_in_a_row: int = setting(3, above=0, fix="use 3")

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for a spike threshold that no check would use."""
        if self.loss_spike is not None and self.action is AnomalyAction.stop:
            raise ConfigError(
                f"{key}.loss_spike",
                self.loss_spike,
                f"has no effect with {key}.action=stop, which does not look at every loss",
                f"set {key}.action=skip or rollback",
            )


class LossWatch:
    """Judges losses one after another, alike on every rank, since all see the global loss."""

    def __init__(self, config: AnomalyConfig) -> None:
        self._threshold = config.loss_spike
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def verdict(self, loss: float) -> str | None:
        """Returns what is wrong with a loss, or None; a good loss is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._threshold is not None and len(self._losses) >= _FEWEST:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(x - median) for x in self._losses)
            # 1.4826 turns the median deviation of a normal distribution into its standard
            # deviation. The floor of 0.1% keeps a flat loss from calling every small change a
            # spike.
            limit = median + self._threshold * 1.4826 * max(deviation, 1e-3 * abs(median))
            if loss > limit:
                return f"the loss spiked to {loss:.4g} (median {median:.4g}, limit {limit:.4g})"
        self._losses.append(loss)
        return None
