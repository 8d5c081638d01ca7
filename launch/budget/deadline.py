"""Says when a job turns late, and when it no longer is."""

from launch.budget.progress import Progress
from monitoring.units import duration

_CLEARLY = 0.05  # of the time that is left


class DeadlineWatch:
    """Compares the projected finish with the deadline, tick by tick.

    The rate is that of all the time since tokens were first seen to come: waiting, starting again
    and doing lost steps again are in it, the first start is not.

    Args:
        deadline: In Unix seconds.
        is_late: What was said last.
        first_sight: When tokens were first seen to come, and how many; None: not yet.
        first_tokens: Those that were there before.
    """

    def __init__(
        self,
        deadline: float,
        is_late: bool,
        first_sight: tuple[float, float] | None,
        first_tokens: float,
    ) -> None:
        self.deadline, self.is_late = deadline, is_late
        self._first_sight, self._first_tokens = first_sight, first_tokens

    def look(self, now: float, progress: Progress) -> str | None:
        """What there is to say.

        Args:
            now: In Unix seconds.
            progress: Of the run.

        Returns:
            One line when it turns late and when it recovers; None otherwise.
        """
        finish = self._finish(now, progress)
        if finish is None:
            return None
        off = duration(abs(finish - self.deadline))
        if not self.is_late and finish > self.deadline:
            self.is_late = True
            return f"the deadline will be missed by {off} at this rate"
        # Clearly, else it would be said again and again
        if self.is_late and finish < self.deadline - _CLEARLY * (self.deadline - now):
            self.is_late = False
            return f"the deadline will be met after all, {off} early"
        return None

    def _finish(self, now: float, progress: Progress) -> float | None:
        """When it will be done, in Unix seconds; None while that cannot be told."""
        left = (progress.total_tokens or 0.0) - progress.tokens
        if progress.total_tokens is not None and left <= 0:
            return None
        if self._first_sight is None:
            if progress.tokens > self._first_tokens:
                self._first_sight = (now, progress.tokens)
        elif progress.total_tokens is not None:
            seconds = now - self._first_sight[0]
            tokens = progress.tokens - self._first_sight[1]
            if seconds > 0 and tokens > 0:
                return now + left * seconds / tokens
        return now if now > self.deadline else None
