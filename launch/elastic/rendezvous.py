"""One generation: a start of the gang on a set of nodes, and the state of its ranks."""

import time
from collections.abc import Sequence
from enum import Enum, auto
from signal import SIGTERM

from core.errors import ExitCode
from launch.elastic.nodes import Node
from launch.elastic.policy import (
    Failure,
    behind,
    failure_of,
    has_begun,
    has_failed,
    highest_step,
    root_cause,
)
from launch.elastic.protocol import RankStatus, Start

# Ranks that lose a peer fail soon after it. Their reports may arrive first, so that the cause is
# searched only after this time.
_ECHO_S = 1.0


class End(Enum):
    """How a generation ended, or why it has to be ended."""

    FINISHED = auto()
    STOPPED = auto()  # on request, or by itself
    REFUSED = auto()
    FAILED = auto()
    OVERDUE = auto()  # did not stop within the grace period
    LOST = auto()  # lost a node
    HUNG = auto()


class StopCause(Enum):
    """The cause of a stop: who told the generation to stop, or that it stops by itself."""

    SIGNAL = auto()  # the supervisor received a signal
    LEAVE = auto()  # a node goes away
    GROW = auto()  # more nodes have joined
    OWN_ACCORD = auto()  # a rank ended with 33 without being told


class Generation:
    """The running gang, as the supervisor knows it.

    Args:
        number: Number of the generation, from 1.
        nodes: Nodes in the order of their ranks; each has answered Prepare.
    """

    def __init__(self, number: int, nodes: Sequence[Node]) -> None:
        self.number, self.nodes = number, nodes
        self.world_size = sum(node.nproc for node in nodes)
        self.stop_cause: StopCause | None = None
        self._grace_s = self._stop_by = 0.0
        self._first_step: int | None = None
        self._failed_at: float | None = None

    def start(self, address: str) -> None:
        """Starts all ranks.

        Args:
            address: Address of the supervisor's machine for the other nodes.
        """
        head = self.nodes[0]
        assert head.ready is not None
        first_rank = 0
        for group_rank, node in enumerate(self.nodes):
            node.start(
                Start(
                    generation=self.number,
                    group_rank=group_rank,
                    first_rank=first_rank,
                    nproc=node.nproc,
                    world_size=self.world_size,
                    master_addr=head.address_seen_from(address),
                    master_port=head.ready.port,
                    time=time.time(),
                )
            )
            first_rank += node.nproc

    @property
    def ranks(self) -> list[RankStatus]:
        """All ranks, with their last reported status."""
        return [rank for node in self.nodes for rank in node.ranks]

    @property
    def step(self) -> int | None:
        """Highest step of any rank; None before the first step."""
        return highest_step(self.ranks)

    @property
    def is_running(self) -> bool:
        """True while a rank runs on a node that is not lost."""
        return any(node.is_running and node.lost is None for node in self.nodes)

    def has_stepped(self) -> bool:
        """Returns whether a step was completed since the start; must be called repeatedly."""
        # A resumed rank first reports the step of its checkpoint, which is no progress.
        step = self.step
        if self._first_step is None:
            self._first_step = step
        return step is not None and self._first_step is not None and step > self._first_step

    def stopping(self, cause: StopCause, grace_s: float) -> None:
        """Records that the generation was told to stop, and its time limit."""
        self.stop_cause, self._grace_s = cause, grace_s
        self._stop_by = time.monotonic() + grace_s

    def silence_s(self) -> float:
        """Returns the seconds since the newest beat of any rank; 0 if no rank beats."""
        beats = [rank.beat_at for rank in self.ranks if rank.beat_at is not None]
        return time.monotonic() - max(beats) if beats else 0.0

    def note_leaving(self) -> None:
        """Marks the nodes as leaving whose ranks report a stop reason: their machine goes away."""
        for node in self.nodes:
            reasons = [r.stop_reason for r in node.ranks if r.stop_reason is not None]
            node.leaving = node.leaving or next(iter(reasons), None)

    def end(self) -> End | None:
        """Returns how the generation ended or has to be ended; None while it may go on."""
        # The order matters: ranks fail because a node was lost, and not the other way round.
        now, exits = time.monotonic(), [rank.exit for rank in self.ranks]
        if any(node.lost is not None and node.is_running for node in self.nodes):
            return End.LOST
        if self._nothing_to_save():
            return End.STOPPED
        if any(self._is_failure(rank) for rank in self.ranks):
            self._failed_at = self._failed_at or now
            if None in exits and now < self._failed_at + _ECHO_S:
                return None
            # One rank that refuses its settings is enough: another start would refuse them too.
            return End.REFUSED if ExitCode.BAD_CONFIG in exits else End.FAILED
        if None not in exits:
            return End.STOPPED if any(exits) else End.FINISHED
        if self.stop_cause is not None and now >= self._stop_by:
            return End.OVERDUE
        return None

    @property
    def has_failure(self) -> bool:
        """True once a rank failed; the others then have `_ECHO_S` to report their failures."""
        return self._failed_at is not None

    def failure(self, end: End) -> Failure | None:
        """Returns the failure behind an end, if it is one; call it before killing any rank."""
        if end is End.FAILED:
            cause = root_cause(self.ranks)
            assert cause is not None
            return failure_of(cause)
        late = behind(self.ranks)
        if end is End.HUNG:
            assert late is not None
            text = f"no rank beat for {self.silence_s():.0f} s; rank {late.rank} is behind: "
            text += f"{late.phase} {late.step}, {time.monotonic() - (late.beat_at or 0):.0f} s ago"
            return Failure(text, "hang", late.step if has_begun(late) else None, event="hang")
        if end is End.OVERDUE:
            stuck = [str(rank.rank) for rank in self.ranks if rank.exit is None]
            text = f"rank {', '.join(stuck)} did not end within {self._grace_s:g} s: killed"
            return Failure(text, "overdue", self.step)
        return None

    def _is_failure(self, rank: RankStatus) -> bool:
        # A program without a handler dies of the SIGTERM that it was sent to stop.
        return has_failed(rank) and not (self._told and rank.exit == -SIGTERM)

    @property
    def _told(self) -> bool:
        return self.stop_cause not in (None, StopCause.OWN_ACCORD)

    def _nothing_to_save(self) -> bool:
        """Returns whether our SIGTERM ended a rank that had no handler yet, nor a step.

        No step is done without that rank, so there is nothing to save. The other ranks may have
        their handlers already; they would wait for the lost rank, or fail. If no rank beats, the
        command is not our trainer and may have work to finish.
        """
        return (
            self._told
            and any(rank.exit == -SIGTERM and not has_begun(rank) for rank in self.ranks)
            and any(rank.phase is not None for rank in self.ranks)
        )
