"""Whether a result is good enough to take its place, by the figures of its report.

Of each figure it is the worse end of the 95% interval that is held to the limit: a result passes
where the samples show that it keeps the limit, not where they leave it open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compression.config import GateConfig
from core.errors import SpotforgeError


class GateError(SpotforgeError):
    """A result is not good enough; nobody set anything wrong.

    Args:
        failed: What it fails by, as `failures` says it.
        report: File that has all figures; no artifact was left.
    """

    def __init__(self, failed: list[str], report: Path) -> None:
        self.failed = "; ".join(failed)
        super().__init__(f"{self.failed}; no artifact was left, the report is {report}")


def failures(gate: GateConfig, evaluation: dict[str, Any]) -> list[str]:
    """What a result fails by: key, limit, what was found; nothing where it passes.

    Args:
        gate: Limits; null ones hold nothing back.
        evaluation: Of the report.
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
        if bound is None:
            why = "one sample, or what is no number, leaves no interval"
        elif (bound <= limit) if end == "high" else (bound >= limit):
            continue
        else:
            side = "up to" if end == "high" else "down to"
            why = f"it is {mean:.4g}, {side} {bound:.4g} by the 95% interval"
        found.append(f"gate.{name}={limit:g}: {figure} fails: {why}")
    return found
