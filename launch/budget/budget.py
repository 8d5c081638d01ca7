"""What may still be spent: pure arithmetic, by which the guard lives and so do simulations."""

import math


class Budget:
    """A sum, paid out a tick at a time, of which the cost of a last save is never touched.

    A tick is paid for before it begins. So whoever is killed in it has paid for it already, and
    what was recorded is never less than what was used.

    Args:
        limit_usd: What the whole job may cost; infinite: as much as it takes.
        tick_s: Length of a tick.
        spent_usd: By earlier starts.
    """

    def __init__(self, limit_usd: float, tick_s: float, spent_usd: float = 0.0) -> None:
        self.limit_usd, self.tick_s, self.spent_usd = limit_usd, tick_s, spent_usd

    def must_stop(self, usd_per_h: float, stop_s: float) -> bool:
        """Whether one tick more would leave too little for a stop.

        To be asked before each tick; before the first, it says that starting is in vain.

        Args:
            usd_per_h: The most that an hour may cost until the stop is over.
            stop_s: What a stop takes: the step under way, and the save.
        """
        return self.spent_usd + cost_usd(self.tick_s + stop_s, usd_per_h) > self.limit_usd

    def spend(self, seconds: float, usd_per_h: float) -> None:
        """Pays; negative seconds come back unused."""
        self.spent_usd += cost_usd(seconds, usd_per_h)

    def left_s(self, usd_per_h: float) -> float:
        """Seconds for which the rest of it lasts."""
        left_usd = max(0.0, self.limit_usd - self.spent_usd)
        return left_usd / usd_per_h * 3600 if usd_per_h > 0 else math.inf


def cost_usd(seconds: float, usd_per_h: float) -> float:
    """Price of a length of time."""
    return seconds / 3600 * usd_per_h
