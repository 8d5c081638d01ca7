"""Traces of how many spot nodes a cloud had, point by point.

In the form in which the Can't Be Late study (Wu et al., NSDI 2024) published them: a JSON object
with `metadata.gap_seconds` and `data`, the number of nodes at each point.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Trace:
    """Nodes that a cloud had at each point of time.

    Attributes:
        name: Folder and file.
        gap_s: Seconds between two points.
        nodes: At each point.
    """

    name: str
    gap_s: float
    nodes: Sequence[int]

    @classmethod
    def read(cls, path: Path, max_nodes: int) -> Trace:
        """Reads a trace, in which more than `max_nodes` are not used."""
        content = json.loads(path.read_text())
        nodes = [min(int(n), max_nodes) for n in content["data"]]
        name = f"{path.parent.name}/{path.stem}"
        return cls(name, float(content["metadata"]["gap_seconds"]), nodes)

    @property
    def losses_per_hour(self) -> float:
        """Nodes that went away, by hour of the whole trace."""
        return _losses(self.nodes) / (len(self.nodes) * self.gap_s / 3600)

    def typical_window(self, hours: float) -> int:
        """Where a window begins that loses nodes as often as the trace does on the whole.

        The first of those that come closest and begin with a node.
        """
        length = round(hours * 3600 / self.gap_s)
        # Where less than one is to be expected, one is seen: else there is nothing to measure.
        wanted = max(1.0, self.losses_per_hour * hours)
        starts = [i for i in range(len(self.nodes) - length) if self.nodes[i] > 0]
        if not starts:
            raise SystemExit(f"{self.name}: there is no window of {hours:.1f} h with a node")
        return min(starts, key=lambda i: abs(_losses(self.nodes[i : i + length]) - wanted))

    def changes(self, first: int, hours: float) -> list[tuple[float, int]]:
        """(seconds from the window's beginning, nodes from then on), the first at 0."""
        window = self.nodes[first : first + round(hours * 3600 / self.gap_s)]
        found = [(0.0, window[0])]
        for i, (before, after) in enumerate(pairwise(window), start=1):
            if before != after:
                found.append((i * self.gap_s, after))
        return found


def _losses(nodes: Sequence[int]) -> int:
    return sum(max(0, before - after) for before, after in pairwise(nodes))
