"""Learns how long ranks are usually silent, and so how long a silence is a hang."""

from collections import defaultdict, deque
from collections.abc import Sequence

from launch.elastic.protocol import RankStatus

_MULTIPLE = 10.0  # of the longest usual silence
_LEAST_S = 20.0
_NUM_STEPS = 20  # before the usual step is known
# The first steps of a start compile, allocate and fill caches, and take far longer than the rest.
_NUM_FIRST_STEPS = 3
_NUM_KEPT = 100


class Patience:
    """Learns the usual silence of a gang in each phase, and derives the limit for a hang.

    A silence is the time between two beats of any ranks. Training, saving and evaluating have their
    own usual silences. In a phase that is not known yet, the limit is `cap_s`.

    Args:
        cap_s: Upper limit, in seconds.
    """

    def __init__(self, cap_s: float) -> None:
        self._cap_s = cap_s
        self._multiple, self._least_s = _MULTIPLE, _LEAST_S
        self.begin()

    def begin(self) -> None:
        """Forgets what was learned: another number of ranks has steps of another length."""
        self._silences: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_NUM_KEPT))
        self._phase: str | None = None  # of the newest beat
        self._beat_at = 0.0
        self._first_step: int | None = None
        self._num_steps = 0

    def observe(self, ranks: Sequence[RankStatus]) -> None:
        """Takes in the current status of all ranks; call it more often than the ranks beat."""
        newest = max(
            (rank for rank in ranks if rank.beat_at is not None),
            key=lambda rank: rank.beat_at or 0.0,
            default=None,
        )
        if newest is None or newest.beat_at is None or newest.beat_at <= self._beat_at:
            return
        if newest.step is not None and newest.phase == "train":
            self._first_step = newest.step if self._first_step is None else self._first_step
            self._num_steps = max(self._num_steps, newest.step - self._first_step)
        if self._phase is not None and self._num_steps > _NUM_FIRST_STEPS:
            self._silences[self._phase].append(newest.beat_at - self._beat_at)
        self._phase, self._beat_at = newest.phase, newest.beat_at

    @property
    def usual_s(self) -> float | None:
        """Longest usual silence in the current phase, in seconds; None if it is not known yet."""
        silences = self._silences.get(self._phase or "")
        if not silences or (self._phase == "train" and self._num_steps < _NUM_STEPS):
            return None
        return max(silences)

    @property
    def limit_s(self) -> float:
        """Seconds of silence after which the gang counts as hanging."""
        if self.usual_s is None:
            return self._cap_s
        return min(self._cap_s, max(self._least_s, self._multiple * self.usual_s))

    def relax(self) -> None:
        """Doubles the limits from now on, since a hang may have been a false alarm."""
        self._multiple *= 2
        self._least_s *= 2
