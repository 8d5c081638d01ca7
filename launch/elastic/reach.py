"""Finds the machines that can all reach each other, before ranks are started on them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_RETRY_S = 60.0
_MAX_RETRY_S = 1800.0
_SLOW = 5.0  # times slower than fast links


@dataclass
class Apart:
    """Tells whether a machine is left out, and when it is tried again.

    Attributes:
        is_left_out: True while others cannot reach it.
        num_losses: How often the supervisor lost its connection to the machine.
        wait_s: Seconds from the last time that it was left out to the next try.
    """

    is_left_out: bool = False
    num_losses: int = 0
    wait_s: float = 0.0
    _left_at: float = 0.0

    def leave_out(self) -> None:
        """Leaves the machine out for a minute, and each time for twice as long."""
        self.is_left_out, self._left_at = True, time.monotonic()
        self.wait_s = min(_MAX_RETRY_S, 2 * self.wait_s) or _RETRY_S

    def is_due(self) -> bool:
        """Returns whether the machine is left out and is to be tried again now."""
        return self.is_left_out and time.monotonic() >= self._left_at + self.wait_s

    def take_back(self) -> None:
        """Takes the machine back; if its link breaks again, the wait goes on from where it was."""
        self.is_left_out = False


class Link(NamedTuple):
    """How one of some machines reaches another one.

    Attributes:
        source: Index of the machine that has tried.
        target: Index of the other one.
        problem: Reason why it does not; None if it does.
        mbit_per_s: Speed in Mbit/s; None if it does not.
    """

    source: int
    target: int
    problem: str | None
    mbit_per_s: float | None


def largest_group(nprocs: Sequence[int], links: Sequence[Link]) -> list[int]:
    """Returns the machines that all reach each other and have the most ranks together.

    Args:
        nprocs: Ranks of each machine.
        links: Both directions of every pair.

    Returns:
        Indices into `nprocs`, ascending.
    """
    broken = {frozenset((x.source, x.target)) for x in links if x.problem is not None}
    if not broken:
        return list(range(len(nprocs)))
    import networkx  # costs 0.3 CPU-seconds, and links are seldom broken

    graph = networkx.Graph()
    for index, nproc in enumerate(nprocs):
        graph.add_node(index, nproc=nproc)
    graph.add_edges_from(
        (i, j) for i in range(len(nprocs)) for j in range(i) if frozenset((i, j)) not in broken
    )
    group, _ = networkx.max_weight_clique(graph, weight="nproc")
    return sorted(group)


def slow_links(links: Sequence[Link]) -> list[tuple[Link, float]]:
    """Returns the links that are far slower than fast ones, with the speed of those in Mbit/s.

    A single slow machine of three has four of six links, so the median would be a slow one; the
    third quartile is not.
    """
    speeds = [link.mbit_per_s for link in links if link.mbit_per_s is not None]
    if len(speeds) < 3:
        return []
    usual = statistics.quantiles(speeds, n=4, method="inclusive")[2]
    return [
        (link, usual)
        for link in links
        if link.mbit_per_s is not None and _SLOW * link.mbit_per_s < usual
    ]
