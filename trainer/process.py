"""One process of a run: the ranks it works with, how it is told to stop, and how it shows life."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from core.errors import Interrupted
from parallel.world import World
from trainer.heartbeat import Heartbeat
from trainer.stopping import StopSignal

_ASK_EVERY_S = 0.5  # each question about other ranks goes to another process


@dataclass
class Process:
    """Holds what a rank has before it knows what it trains.

    Attributes:
        world: Ranks of the run.
        stop: Flag that signals set.
        heartbeat: Heartbeat of this rank.
    """

    world: World
    stop: StopSignal
    heartbeat: Heartbeat
    _asked: float = field(default_factory=time.monotonic, repr=False)

    def poll(self) -> bool:
        """Beats; returns whether this rank was told to stop, on which ranks have to agree."""
        self.heartbeat.beat()
        return self.stop.requested()

    def poll_apart(self) -> bool:
        """Beats; returns whether any rank was told to stop, while ranks are not in step.

        One rank prepares data, for example, and the others wait for it, so a stop is announced
        through the store instead of a collective.
        """
        if self.poll():
            self.world.announce_stop()
            return True
        if time.monotonic() - self._asked < _ASK_EVERY_S:
            return False
        self._asked = time.monotonic()
        return self.world.stop_announced()

    def refuse_to_start(self) -> None:
        """Raises Interrupted on every rank if any rank was told to stop; collective."""
        if any(self.world.sum(self.poll())):
            stopped = Interrupted("told to stop before training started; nothing was lost")
            stopped.seen_by_all = True
            raise stopped
