"""Judges by the figures of its report whether a result is good enough to take its place.

The worse end of each figure's 95% interval is compared with the limit: a result passes if the
samples show that it keeps the limit, not if they leave it open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compression.config import GateConfig
from core.errors import SpotforgeError


class GateError(SpotforgeError):
    """A result is not good enough, although no setting is wrong.

    Args:
        failed: Limits that the result fails, as `failures` describes them.
        report: File with all figures; no artifact was left.
    """

    def __init__(self, failed: list[str], report: Path) -> None:
        self.failed = "; ".join(failed)
        super().__init__(f"{self.failed}; no artifact was left, the report is {report}")


def failures(gate: GateConfig, evaluation: dict[str, Any]) -> list[str]:
    """Returns the limits that a result fails, with what was found; an empty list if it passes.

    Args:
        gate: Limits, of which null ones are not checked.
        evaluation: Field `evaluation` of the report.
    """
    rules = (
        ("max_perplexity_ratio", gate.max_perplexity_ratio, "perplexity_ratio", "high"),
        ("max_kl", gate.max_kl, "kl_nats", "high"),
        ("min_greedy_agreement", gate.min_greedy_agreement, "greedy_agreement", "low"),
    )
    found = []
    for name, limit, figure, end in rules:
        if limit is None:
            continue
        mean, bound = evaluation[figure]["mean"], evaluation[figure][end]
        # JSON has no infinity: `Interval.describe` writes null.
        if bound is None:
            why = "a single sample or a value that is not finite leaves no interval"
        elif (bound <= limit) if end == "high" else (bound >= limit):
            continue
        else:
            side = "up to" if end == "high" else "down to"
            why = f"it is {mean:.4g}, {side} {bound:.4g} by the 95% interval"
        found.append(f"gate.{name}={limit:g}: {figure} fails: {why}")
    return found
