"""Describes which weights become zero. Imports no torch."""

from __future__ import annotations

from enum import Enum


class Criterion(Enum):
    """Criterion by which a weight is judged; wanda and sparsegpt also use the layer's inputs."""

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"


class Pattern(Enum):
    """Positions at which zeros may be: anywhere, or a fixed number in each run of inputs."""

    unstructured = "unstructured"
    two_of_four = "two_of_four"
    four_of_eight = "four_of_eight"

    @property
    def kept_of(self) -> tuple[int, int]:
        """Number of weights that stay in a run, and length of the run."""
        return {Pattern.two_of_four: (2, 4), Pattern.four_of_eight: (4, 8)}[self]
