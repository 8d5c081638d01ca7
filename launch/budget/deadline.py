"""Reports when a job falls behind its deadline, and when it catches up."""

from launch.budget.progress import Progress
from monitoring.units import duration

_CLEARLY = 0.05  # of the time that is left


class DeadlineWatch:
    """Compares the projected finish with the deadline, tick by tick.

    The rate is the mean since training was first seen to progress. It includes waiting, restarts
    and repeated steps, but not the first start.

    Args:
        deadline: Unix seconds of the deadline.
        is_late: True if the last report said that the job is late.
        first_sight: Unix seconds and tokens of the first observed progress; None: none yet.
        first_tokens: Tokens that the run had before.
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
        """Compares the projected finish with the deadline.

        Args:
            now: Current time in Unix seconds.
            progress: Progress of the run.

        Returns:
            A line for the user when the job becomes late or recovers; None otherwise.
        """
        finish = self._finish(now, progress)
        if finish is None:
            return None
        off = duration(abs(finish - self.deadline))
        if not self.is_late and finish > self.deadline:
            self.is_late = True
            return f"the deadline will be missed by {off} at this rate"
        # Only a clear margin ends the alarm: a finish near the deadline would toggle it each tick.
        if self.is_late and finish < self.deadline - _CLEARLY * (self.deadline - now):
            self.is_late = False
            return f"the deadline will be met after all, {off} early"
        return None

    def _finish(self, now: float, progress: Progress) -> float | None:
        """Returns the projected finish in Unix seconds; None while there is no rate."""
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
        # Without a rate the job is late only once the deadline has passed.
        return now if now > self.deadline else None
