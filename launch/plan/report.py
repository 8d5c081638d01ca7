"""A plan as a table for people, and as JSON for programs."""

import json
import sys
from dataclasses import asdict
from typing import Any

from launch.config import Currency, LaunchConfig
from launch.plan.candidate import Candidate, Rejected
from launch.plan.cost import (
    COPY_GB_PER_S,
    GPU_HOURS_BETWEEN_FAILURES,
    WRITE_GB_PER_S,
)
from launch.plan.planner import Plan
from monitoring.units import compact, duration


def table(plan: Plan, top: int, with_rejected: bool) -> str:
    """Returns a plan as text for people.

    Args:
        plan: Plan to show.
        top: Number of candidates to show.
        with_rejected: True to show all that is rejected, instead of one example for each rule.
    """
    money = _Money(plan.settings.launch)
    lines = [*_head(plan), "", *_candidates(plan, top, money), ""]
    return "\n".join([*lines, *_rejected(plan, with_rejected), *_assumptions(plan)])


class _Money:
    """Formats sums in dollars, or in rupees with GST."""

    def __init__(self, launch: LaunchConfig) -> None:
        is_inr = launch.currency is Currency.inr
        self.sign = _rupee() if is_inr else "$"
        self._rate = launch.usd_inr * (1 + launch.gst) if is_inr else 1.0

    def __call__(self, usd: float) -> str:
        value = usd * self._rate
        return f"{value:,.0f}" if value >= 1000 else f"{value:,.2f}"

    def small(self, usd: float) -> str:
        """Formats a small sum with four decimals."""
        return f"{usd * self._rate:.4f}"


def _rupee() -> str:
    """Returns the rupee sign, or `INR ` if the terminal's encoding lacks it."""
    try:
        "\u20b9".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "INR "
    return "\u20b9"


def _head(plan: Plan) -> list[str]:
    work, catalog = plan.workload, plan.catalog
    flops = work.total_tokens * work.flops_per_token
    days = f"{catalog.age_days} day{'' if catalog.age_days == 1 else 's'} old"
    return [
        f"{plan.settings.trainer.run.name}: {compact(work.shape.num_parameters)} parameters, "
        f"{compact(work.total_tokens)} tokens in {work.total_steps:,} steps, {flops:.2e} FLOPs; "
        f"a checkpoint has {work.checkpoint_gb:.1f} GB",
        f"prices: {catalog.date} ({days}), {len(catalog.offers)} offers, {catalog.source}, "
        f"{catalog.digest[:19]}",
    ]


def _candidates(plan: Plan, top: int, money: _Money) -> list[str]:
    shown = plan.candidates[:top]
    places = [f"{c.offer.place} {c.offer.instance_type}".strip() for c in shown]
    width = max(len("where"), *(len(place) for place in places))
    lines = [
        f"{'':>4}{money.sign + '/job':>12}{money.sign + '/Mtok':>10}{'P50':>8}{'P95':>8}"
        f"{'tok/s':>8}{'losses':>8}{'GiB/GPU':>9}  {'GPUs':<22}{'':<11}{'where':<{width}}"
    ]
    tokens = plan.workload.total_tokens / 1e6
    for rank, (candidate, place) in enumerate(zip(shown, places, strict=True), 1):
        offer, usd = candidate.offer, candidate.costs.total_usd
        nodes = f"{candidate.num_nodes} x " if candidate.num_nodes > 1 else ""
        gpus = f"{nodes}{offer.gpus_per_node} {offer.gpu}"
        kind = "owned" if offer.pool else "spot" if offer.is_spot else "on-demand"
        lines.append(
            f"{rank:>3} {money(usd):>12}{money.small(usd / tokens):>10}"
            f"{duration(candidate.p50_h * 3600):>8}{duration(candidate.p95_h * 3600):>8}"
            f"{compact(candidate.tokens_per_s):>8}{candidate.preemptions:>8.1f}"
            f"{candidate.memory_gib:>9.1f}  {gpus:<22}{kind:<11}{place:<{width}}".rstrip()
        )
    best = plan.candidates[0].costs
    lines.append(
        f"the first: compute {money.sign}{money(best.compute_usd)}, interruptions and saves "
        f"{money.sign}{money(best.waste_usd)}, egress {money.sign}{money(best.egress_usd)}, "
        f"storage {money.sign}{money(best.storage_usd)}; speed by {plan.candidates[0].speed_source}"
    )
    if len(plan.candidates) > top:
        lines.append(f"and {len(plan.candidates) - top} more (--top)")
    return lines


def _rejected(plan: Plan, with_all: bool) -> list[str]:
    if not plan.rejected:
        return []

    def line(rejected: Rejected, count: int) -> str:
        offer = rejected.offer
        gpus = f"{rejected.num_nodes} x {offer.gpus_per_node} {offer.gpu}"
        return f"{count:>6} {rejected.reason:<14}{offer.place}, {gpus}: {rejected.text}"

    if with_all:
        return ["rejected:", *(line(rejected, 1) for rejected in plan.rejected), ""]
    by_reason: dict[str, list[Rejected]] = {}
    for rejected in plan.rejected:
        by_reason.setdefault(rejected.reason, []).append(rejected)
    ordered = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    examples = [line(of_reason[0], len(of_reason)) for _, of_reason in ordered]
    return ["rejected, an example each:", *examples, ""]


def _assumptions(plan: Plan) -> list[str]:
    launch, checkpoint = plan.settings.launch, plan.settings.trainer.checkpoint
    lines = [
        f"assumed: a spot node lasts {checkpoint.mean_hours_between_preemptions:g} h "
        f"(checkpoint.mean_hours_between_preemptions, launch.preemption_hours), what is not spot "
        f"{GPU_HOURS_BETWEEN_FAILURES:,.0f} GPU-hours; a start takes {launch.restart_minutes:g} "
        f"min, new spot {launch.wait_minutes:g} min; checkpoints are copied at "
        f"{COPY_GB_PER_S:g} and written at {WRITE_GB_PER_S:g} GB/s a node",
    ]
    if launch.currency is Currency.inr:
        lines.append(f"rupees: {launch.usd_inr:g} a dollar, with {launch.gst:.0%} GST")
    else:
        lines.append("before taxes (launch.currency=inr shows rupees with GST)")
    return lines


def as_json(plan: Plan) -> str:
    """Returns a whole plan as JSON, in dollars before taxes; equal plans give equal bytes."""
    work, catalog, launch = plan.workload, plan.catalog, plan.settings.launch
    content = {
        "run": plan.settings.trainer.run.name,
        "workload": {
            "num_parameters": work.shape.num_parameters,
            "total_tokens": work.total_tokens,
            "total_steps": work.total_steps,
            "flops_per_token": work.flops_per_token,
            "checkpoint_gb": work.checkpoint_gb,
            "export_gb": work.export_gb,
        },
        "catalog": {
            "source": catalog.source,
            "date": catalog.date.isoformat(),
            "age_days": catalog.age_days,
            "digest": catalog.digest,
            "num_offers": len(catalog.offers),
        },
        "usd_inr": launch.usd_inr,
        "gst": launch.gst,
        "candidates": [_candidate(plan, candidate) for candidate in plan.candidates],
        "rejected": [
            {
                "offer": rejected.offer.as_row(),
                "num_nodes": rejected.num_nodes,
                "reason": rejected.reason,
                "text": rejected.text,
            }
            for rejected in plan.rejected
        ],
    }
    return json.dumps(content, indent=1)


def _candidate(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    total_usd = candidate.costs.total_usd
    return asdict(candidate) | {
        "offer": candidate.offer.as_row(),
        "num_gpus": candidate.num_gpus,
        "total_usd": total_usd,
        "usd_per_million_tokens": total_usd / plan.workload.total_tokens * 1e6,
    }
