"""Decisions of the supervisor as pure functions: which nodes, which cause, when to give up."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import ExitCode
from core.process.child import describe_exit
from launch.elastic.protocol import RankStatus

# Failures without progress after which the supervisor gives up: with the same error, or with any.
_SAME_FAILURES = 3
_FAILURES = 10
_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 60.0


def choose_nodes(nprocs: Sequence[int], multiple_of: int) -> list[int]:
    """Returns the nodes of the largest gang whose size is a multiple of `multiple_of`.

    Args:
        nprocs: Ranks that each node offers, in the order in which the nodes joined.
        multiple_of: Divisor of the number of ranks, at least 1.

    Returns:
        Indices into `nprocs`, ascending; of equal choices the one with earlier nodes; empty if no
        gang is possible.
    """
    # For each remainder, the largest gang of the nodes so far that has it: (ranks, nodes).
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for node, nproc in enumerate(nprocs):
        for ranks, nodes in list(best.values()):
            remainder = (ranks + nproc) % multiple_of
            if ranks + nproc > best.get(remainder, (0, []))[0]:
                best[remainder] = (ranks + nproc, [*nodes, node])
    return best[0][1]


def has_failed(rank: RankStatus) -> bool:
    """Returns whether a rank ended with an exit code other than 0 (done) and 33 (stopped)."""
    return rank.exit not in (None, ExitCode.FINISHED, ExitCode.START_AGAIN)


def root_cause(ranks: Sequence[RankStatus]) -> RankStatus | None:
    """Returns the rank that failed first; the others fail because they lost it.

    A rank that a signal killed (negative exit code) comes before ranks with an error: it left none,
    and caused theirs.
    """
    failed = [rank for rank in ranks if has_failed(rank)]
    # False sorts first: killed by a signal, then with an error, then the earliest.
    return min(
        failed,
        key=lambda r: ((r.exit or 0) > 0, r.error is None, r.ended_at or 0.0),
        default=None,
    )


def behind(ranks: Sequence[RankStatus]) -> RankStatus | None:
    """Returns the rank for which a hanging gang waits: lowest step, then oldest beat."""
    beating = [rank for rank in ranks if rank.beat_at is not None]
    return min(beating, key=lambda r: (r.step or 0, r.beat_at or 0.0), default=None)


def highest_step(ranks: Sequence[RankStatus]) -> int | None:
    """Returns the highest step of the ranks; None before the first step."""
    return max((r.step or 0 for r in ranks if has_begun(r)), default=None)


def has_begun(rank: RankStatus) -> bool:
    """Returns whether a rank has begun to train; earlier phases (e.g. `data 0`) lose no work."""
    return rank.phase not in (None, "starting") and (rank.phase == "train" or bool(rank.step))


@dataclass(frozen=True)
class Failure:
    """The failure of a generation.

    Attributes:
        text: One line for the user.
        error: Error without its numbers and addresses: equal for two failures of the same kind.
        step: Step of the failure; None before the first step.
        traceback: Traceback that the rank wrote; None without one.
        event: Name of the event: `fail` or `hang`.
    """

    text: str
    error: str
    step: int | None
    traceback: str | None = None
    event: str = "fail"


def failure_of(rank: RankStatus) -> Failure:
    """Returns the failure that a failed rank reports."""
    how, last_line = describe_exit(rank.exit or 0), _last_line(rank.error or "")
    step = rank.step if has_begun(rank) else None
    text = f"rank {rank.rank} {how}"
    if rank.phase is not None:  # without heartbeat it is another program, which has no steps
        text += " before its first step" if step is None else f" at step {step}"
    if last_line:
        text += f": {last_line[:200]}"
    # Ports, process ids and addresses differ between two occurrences of one error.
    error = re.sub(r"0x[0-9a-fA-F]+|\d+", "#", last_line) if last_line else how
    return Failure(text, error, step, rank.error)


def _last_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1] if lines else ""


class History:
    """The progress of all generations, and their failures since the last progress.

    Attributes:
        step: Highest step that any generation reached; None before the first step.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._failures: list[tuple[str, int | None]] = []

    def reached(self, step: int | None) -> None:
        """Records the last step of a generation; a new highest step clears the failures."""
        if step is not None and (self.step is None or step > self.step):
            self.step = step
            self._failures.clear()

    def failed(self, error: str, step: int | None) -> None:
        """Records a failure; call it after `reached`.

        Args:
            error: Error; see `Failure.error`.
            step: Step of the failure; None before the first step.
        """
        self._failures.append((error, step))

    @property
    def num_failures(self) -> int:
        """Number of failures since the last progress."""
        return len(self._failures)

    def crash_loop(self) -> str | None:
        """Returns why another start would fail too; None while one is worth trying."""
        if not self._failures:
            return None
        (_, step), num_same = Counter(self._failures).most_common(1)[0]
        if num_same >= _SAME_FAILURES:
            where = "before its first step" if step is None else f"at step {step}"
            return f"the same error {num_same} times {where}"
        if len(self._failures) >= _FAILURES:
            return f"{len(self._failures)} failures in a row without progress"
        return None

    def backoff_s(self) -> float:
        """Returns the seconds to wait before the next start."""
        wait_s = min(_MAX_BACKOFF_S, _BACKOFF_S * 2.0 ** max(0, self.num_failures - 1))
        return wait_s * random.uniform(0.5, 1.5)  # machines that fail together start apart
