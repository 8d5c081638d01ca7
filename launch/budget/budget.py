"""The budget of a job: pure arithmetic, which both the guard and simulations use."""

import math


class Budget:
    """A sum that is spent one tick at a time and always keeps back the cost of a last save.

    A tick is paid for before it begins. A job that is killed during a tick has therefore paid for
    it, and the recorded cost is never below the actual one.

    Args:
        limit_usd: Most that the whole job may cost; infinite: no limit.
        tick_s: Length of a tick in seconds.
        spent_usd: Dollars that earlier starts have spent.
    """

    def __init__(self, limit_usd: float, tick_s: float, spent_usd: float = 0.0) -> None:
        self.limit_usd, self.tick_s, self.spent_usd = limit_usd, tick_s, spent_usd

    def must_stop(self, usd_per_h: float, stop_s: float) -> bool:
        """Returns whether one more tick would leave too little money for a stop.

        Call it before each tick. If it is true before the first one, the job must not start.

        Args:
            usd_per_h: Highest price of an hour until the stop is over.
            stop_s: Seconds that a stop takes: the current step and the save.
        """
        return self.spent_usd + cost_usd(self.tick_s + stop_s, usd_per_h) > self.limit_usd

    def spend(self, seconds: float, usd_per_h: float) -> None:
        """Adds the cost of `seconds`; negative seconds refund unused time."""
        self.spent_usd += cost_usd(seconds, usd_per_h)

    def left_s(self, usd_per_h: float) -> float:
        """Returns the seconds for which the rest of the budget lasts."""
        left_usd = max(0.0, self.limit_usd - self.spent_usd)
        return left_usd / usd_per_h * 3600 if usd_per_h > 0 else math.inf


def cost_usd(seconds: float, usd_per_h: float) -> float:
    """Returns the price of a number of seconds."""
    return seconds / 3600 * usd_per_h
