"""Decisions that need no process: who takes part, what failed first, when to give up."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import ExitCode
from core.process.child import describe_exit
from launch.elastic.protocol import RankStatus

_SAME_FAILURES = 3
_FAILURES = 10
_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 60.0


def choose_nodes(nprocs: Sequence[int], multiple_of: int) -> list[int]:
    """The nodes that make the largest gang whose size is a multiple of `multiple_of`.

    Args:
        nprocs: Ranks that each node offers, in the order in which they joined.
        multiple_of: At least 1.

    Returns:
        Indices into `nprocs`, ascending; the earlier node where two would do; [] where none do.
    """
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # remainder -> ranks, nodes
    for node, nproc in enumerate(nprocs):
        for ranks, nodes in list(best.values()):
            remainder = (ranks + nproc) % multiple_of
            if ranks + nproc > best.get(remainder, (0, []))[0]:
                best[remainder] = (ranks + nproc, [*nodes, node])
    return best[0][1]


def has_failed(rank: RankStatus) -> bool:
    """Whether a rank ended, and neither because it was done nor because it was told to."""
    return rank.exit not in (None, ExitCode.FINISHED, ExitCode.START_AGAIN)


def root_cause(ranks: Sequence[RankStatus]) -> RankStatus | None:
    """The rank that failed first; the others fail because they lost it.

    One that was killed by a signal left no error: it is the cause of those that did.
    """
    failed = [rank for rank in ranks if has_failed(rank)]
    return min(
        failed,
        key=lambda r: ((r.exit or 0) > 0, r.error is None, r.ended_at or 0.0),
        default=None,
    )


def behind(ranks: Sequence[RankStatus]) -> RankStatus | None:
    """The rank that the others of a hanging gang wait for: lowest step, then oldest beat."""
    beating = [rank for rank in ranks if rank.beat_at is not None]
    return min(beating, key=lambda r: (r.step or 0, r.beat_at or 0.0), default=None)


def highest_step(ranks: Sequence[RankStatus]) -> int | None:
    """How far the gang is; None before its first step."""
    return max((r.step or 0 for r in ranks if has_begun(r)), default=None)


def has_begun(rank: RankStatus) -> bool:
    """Whether a rank trains, or has: what comes before (`data 0`, say) leaves nothing to lose."""
    return rank.phase not in (None, "starting") and (rank.phase == "train" or bool(rank.step))


@dataclass(frozen=True)
class Failure:
    """Why a generation has to be started again, if at all.

    Attributes:
        text: One line for the user.
        error: What makes it the same as another: without its numbers and addresses.
        step: Where it happened; None before the first step.
        traceback: What the rank left.
        event: `fail` or `hang`.
    """

    text: str
    error: str
    step: int | None
    traceback: str | None = None
    event: str = "fail"


def failure_of(rank: RankStatus) -> Failure:
    """What became of a rank that failed."""
    how, last_line = describe_exit(rank.exit or 0), _last_line(rank.error or "")
    step = rank.step if has_begun(rank) else None
    text = f"rank {rank.rank} {how}"
    if rank.phase is not None:  # else it is none of ours, and has no steps
        text += " before its first step" if step is None else f" at step {step}"
    if last_line:
        text += f": {last_line[:200]}"
    error = re.sub(r"0x[0-9a-fA-F]+|\d+", "#", last_line) if last_line else how
    return Failure(text, error, step, rank.error)


def _last_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1] if lines else ""


class History:
    """How far the generations came, and what they failed of since they last came further.

    Attributes:
        step: Highest step that any of them reached; None before the first one.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._failures: list[tuple[str, int | None]] = []

    def reached(self, step: int | None) -> None:
        """Notes how far a generation came. Further than any before it is progress."""
        if step is not None and (self.step is None or step > self.step):
            self.step = step
            self._failures.clear()

    def failed(self, error: str, step: int | None) -> None:
        """Notes a failure, after `reached`.

        Args:
            error: What makes it the same as another.
            step: Where it happened.
        """
        self._failures.append((error, step))

    @property
    def num_failures(self) -> int:
        """Failures since the last progress."""
        return len(self._failures)

    def crash_loop(self) -> str | None:
        """Why there is no point in another start; None while there is one."""
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
        """How long to wait before the next start."""
        wait_s = min(_MAX_BACKOFF_S, _BACKOFF_S * 2.0 ** max(0, self.num_failures - 1))
        return wait_s * random.uniform(0.5, 1.5)  # machines that fail together start apart
