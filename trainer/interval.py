"""Decides when to save: after a number of steps, after a time, or as often as it pays.

Saving costs time, and so does repeating the steps since the last save. The sum is smallest at the
interval of Young (1974) and Daly (2006), which depends on the cost of a save and on the rate of
losses of the machine. Both are measured during the run.
"""

import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.errors import ConfigError

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
# Before the first save was measured: early enough to lose little, late enough for stable timing.
_FIRST_SAVE_S = 60.0
# What a save costs changes with the load of the disk, so only recent ones count.
_SAVES_REMEMBERED = 5


@dataclass(frozen=True)
class Interval:
    """Holds the parsed `checkpoint.interval`; with no attribute set, saves happen only at the end.

    Attributes:
        steps: Number of steps between saves.
        seconds: Time between saves, in seconds.
        auto: True derives the interval from the measured cost and the preemption rate.
    """

    steps: int | None = None
    seconds: float | None = None
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> "Interval":
        """Parses `auto`, `end`, a number of steps, or a time such as `90s`, `10min`, `1.5h`.

        Raises:
            ConfigError: The text has another form.
        """
        if text == "auto":
            return cls(auto=True)
        if text == "end":
            return cls()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)?", text)
        if match and match[2] and float(match[1]) > 0:
            return cls(seconds=float(match[1]) * _SECONDS[match[2]])
        if match and not match[2] and text.isdecimal() and int(text) > 0:
            return cls(steps=int(text))
        raise ConfigError(
            "checkpoint.interval",
            text,
            "must be auto, end, a number of steps, or a time with its unit",
            "use auto, 500, 90s, 10min or 1h",
        )


def optimal_interval(cost: float, mtbf: float) -> float:
    """Returns the training time between two saves that minimizes the total time lost.

    Source: Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart
    dumps", eq. 37; its first term is Young 1974, sqrt(2 C M).

    Args:
        cost: C, the time that a save takes from training, in the unit of the result.
        mtbf: M, the mean time between losses of the machine, in the same unit.
    """
    # The series is not valid here; Daly sets the interval to M.
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def expected_mtbf_s(prior_s: float, trained_s: float, num_losses: int) -> float:
    """Returns the mean time between losses, given a prior that counts as one loss.

    It is the posterior mean of an exponential rate whose Gamma prior has the weight of one loss.
    """
    return (prior_s + trained_s) / (1 + num_losses)


class SaveSchedule:
    """Tells when the next save is due; asked on one rank, which tells the others.

    Args:
        interval: Interval that the user chose.
        mtbf_s: Mean time between losses of the machine; used by `auto` only.
        costs_s: Time that each save of earlier starts took from training, in order.
        clock: Function that returns seconds from any origin.
    """

    def __init__(
        self,
        interval: Interval,
        mtbf_s: float,
        costs_s: Iterable[float] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval, self._mtbf_s, self._clock = interval, mtbf_s, clock
        self._costs_s = deque(costs_s, maxlen=_SAVES_REMEMBERED)
        self._since = clock()

    @property
    def interval_s(self) -> float | None:
        """Seconds between saves; None if time does not decide."""
        if not self._interval.auto:
            return self._interval.seconds
        if not self._costs_s:
            return min(_FIRST_SAVE_S, self._mtbf_s / 2)
        return optimal_interval(math.fsum(self._costs_s) / len(self._costs_s), self._mtbf_s)

    def due(self, step: int) -> bool:
        """Returns whether to save after `step`."""
        if self._interval.steps is not None:
            return step % self._interval.steps == 0
        interval_s = self.interval_s
        return interval_s is not None and self._clock() - self._since >= interval_s

    def saved(self, blocking_s: float) -> None:
        """Records a save and the time that it took from training."""
        self._costs_s.append(blocking_s)
        self._since = self._clock()
