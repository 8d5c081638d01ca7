"""Traces of the number of spot nodes that a cloud had over time.

The format is that of the Can't Be Late study (Wu et al., NSDI 2024): a JSON object with
`metadata.gap_seconds` and `data`, the number of nodes at each point.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Trace:
    """Holds the number of nodes that a cloud had at each point of time.

    Attributes:
        name: Folder and file of the trace.
        gap_s: Time between two points, in seconds.
        nodes: Number of nodes at each point.
    """

    name: str
    gap_s: float
    nodes: Sequence[int]

    @classmethod
    def read(cls, path: Path, max_nodes: int) -> Trace:
        """Reads a trace; more than `max_nodes` nodes at a point are ignored."""
        content = json.loads(path.read_text())
        nodes = [min(int(n), max_nodes) for n in content["data"]]
        name = f"{path.parent.name}/{path.stem}"
        return cls(name, float(content["metadata"]["gap_seconds"]), nodes)

    @property
    def changes_per_hour(self) -> float:
        """Number of nodes that came or went per hour, over the whole trace."""
        return _changes(self.nodes) / (len(self.nodes) * self.gap_s / 3600)

    def typical_window(self, hours: float) -> int:
        """Returns the start of a window with about as many changes as the trace has on average.

        Of the windows that come closest and start with a node, the middle one is taken: the first
        one would only just reach the last of its changes.
        """
        length = round(hours * 3600 / self.gap_s)
        # With less than one expected change, one is required: otherwise there is nothing to
        # measure.
        wanted = max(1.0, self.changes_per_hour * hours)
        starts = [i for i in range(len(self.nodes) - length) if self.nodes[i] > 0]
        if not starts:
            raise SystemExit(f"{self.name}: there is no window of {hours:.1f} h with a node")
        seen = {i: abs(_changes(self.nodes[i : i + length]) - wanted) for i in starts}
        closest = [i for i in starts if seen[i] == min(seen.values())]
        return closest[len(closest) // 2]

    def changes(self, first: int, hours: float) -> list[tuple[float, int]]:
        """Returns pairs (seconds since the window's start, nodes from then on), the first at 0."""
        window = self.nodes[first : first + round(hours * 3600 / self.gap_s)]
        found = [(0.0, window[0])]
        for i, (before, after) in enumerate(pairwise(window), start=1):
            if before != after:
                found.append((i * self.gap_s, after))
        return found


def _changes(nodes: Sequence[int]) -> int:
    return sum(abs(after - before) for before, after in pairwise(nodes))
