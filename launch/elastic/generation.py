"""One start of the gang: its nodes, and how its ranks are doing."""

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

_ECHO_S = 1.0  # ranks that lost a peer fail after it: time for the real error to show


class End(Enum):
    """How a generation ended, or why it has to."""

    FINISHED = auto()
    STOPPED = auto()  # as asked by somebody, or on its own accord
    REFUSED = auto()
    FAILED = auto()
    OVERDUE = auto()  # asked to stop, and did not
    LOST = auto()  # a node
    HUNG = auto()


class StopCause(Enum):
    """Why a generation was told to stop, or stops without being told."""

    SIGNAL = auto()  # to the supervisor
    LEAVE = auto()  # of a node
    GROW = auto()
    OWN_ACCORD = auto()


class Generation:
    """What the supervisor knows of the gang that runs.

    Args:
        number: 1 for the first.
        nodes: In the order of their ranks; each is ready.
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
            address: Where the others reach a node that shares the supervisor's machine.
        """
        head = self.nodes[0]
        assert head.ready is not None
        shared = head.address.startswith("127.") or head.address == "::1"
        first_rank = 0
        for group_rank, node in enumerate(self.nodes):
            node.start(
                Start(
                    generation=self.number,
                    group_rank=group_rank,
                    first_rank=first_rank,
                    nproc=node.nproc,
                    world_size=self.world_size,
                    master_addr=address if shared else head.address,
                    master_port=head.ready.port,
                )
            )
            first_rank += node.nproc

    @property
    def ranks(self) -> list[RankStatus]:
        """All ranks, as last told."""
        return [rank for node in self.nodes for rank in node.ranks]

    @property
    def step(self) -> int | None:
        """How far it is; None before its first step."""
        return highest_step(self.ranks)

    @property
    def is_running(self) -> bool:
        """Whether a rank runs on a node that is there."""
        return any(node.is_running and node.lost is None for node in self.nodes)

    def has_stepped(self) -> bool:
        """Whether it has completed a step since its start; to be asked now and then."""
        step = self.step
        if self._first_step is None:
            self._first_step = step
        return step is not None and self._first_step is not None and step > self._first_step

    def stopping(self, cause: StopCause, grace_s: float) -> None:
        """Notes that it is to stop, and by when."""
        self.stop_cause, self._grace_s = cause, grace_s
        self._stop_by = time.monotonic() + grace_s

    def silence_s(self) -> float:
        """Seconds since the newest beat of any rank; 0 for ranks that do not beat."""
        beats = [rank.beat_at for rank in self.ranks if rank.beat_at is not None]
        return time.monotonic() - max(beats) if beats else 0.0

    def note_leaving(self) -> None:
        """Has the nodes leave whose ranks were told to stop: their machines are going away."""
        for node in self.nodes:
            reasons = [r.stop_reason for r in node.ranks if r.stop_reason is not None]
            node.leaving = node.leaving or next(iter(reasons), None)

    def end(self) -> End | None:
        """How it ended, or has to; None while it may go on."""
        now, exits = time.monotonic(), [rank.exit for rank in self.ranks]
        if any(node.lost is not None and node.is_running for node in self.nodes):
            return End.LOST
        if self._nothing_to_save():
            return End.STOPPED
        if any(self._is_failure(rank) for rank in self.ranks):
            self._failed_at = self._failed_at or now
            if None in exits and now < self._failed_at + _ECHO_S:
                return None
            return End.REFUSED if ExitCode.BAD_CONFIG in exits else End.FAILED
        if None not in exits:
            return End.STOPPED if any(exits) else End.FINISHED
        if self.stop_cause is not None and now >= self._stop_by:
            return End.OVERDUE
        return None

    @property
    def has_failure(self) -> bool:
        """Whether a rank failed, while the others have a moment to show what was the cause."""
        return self._failed_at is not None

    def failure(self, end: End) -> Failure | None:
        """What went wrong, where `end` means that something did; to be asked before any kill."""
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
        return has_failed(rank) and not (self._told and rank.exit == -SIGTERM)

    @property
    def _told(self) -> bool:
        return self.stop_cause not in (None, StopCause.OWN_ACCORD)

    def _nothing_to_save(self) -> bool:
        """Whether our SIGTERM ended a rank that had no handler yet: no step is done without it.

        The others may have theirs already, and wait for it in vain, or fail for want of it. Where
        none beats, they are not ours, and may have more to do.
        """
        return (
            self._told
            and any(rank.exit == -SIGTERM and not has_begun(rank) for rank in self.ranks)
            and any(rank.phase is not None for rank in self.ranks)
        )
