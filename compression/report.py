"""Prints the report of a compression, and plots several compressions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from compression.artifact import CANDIDATES


def print_report(artifact: Path, report: dict[str, Any]) -> None:
    """Prints the table of one artifact: parent, child, and their ratio."""
    table = Table(title=f"{report['recipe']} as {report['target']}", title_justify="left")
    parent_dtype = report["speed"].get("parent", {}).get("dtype")
    for column in ("", f"parent{_in(parent_dtype)}", "child", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in _rows(report):
        table.add_row(*row)
    console = Console()
    console.print(table)
    if CANDIDATES not in artifact.parts:  # a candidate is moved or removed later
        console.print(f"{artifact}", soft_wrap=True)


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    quality = report["evaluation"]
    parent_bytes, child_bytes = report["parent_weight_bytes"], report["weight_bytes"]
    rows = [
        (
            "MB on disk",
            f"{parent_bytes / 1e6:.1f}",
            f"{child_bytes / 1e6:.1f}",
            f"{child_bytes / parent_bytes:.3f} x",
        ),
        (
            "perplexity",
            f"{quality['parent_perplexity']:.4f}",
            f"{quality['child_perplexity']:.4f}",
            f"{_interval(quality['perplexity_ratio'], '.4f')} x",
        ),
        ("KL to the parent, nats/token", "", _interval(quality["kl_nats"], ".3g"), ""),
        ("same greedy token", "", _interval(quality["greedy_agreement"], ".3f"), ""),
    ]
    loaded = report["as_loaded"]
    # The figures above were computed in float32: they are those of the artifact as loaded.
    if loaded["dtype"] != "float32":
        named = f"as loaded{_in(loaded['dtype'])}"
        ratio = f"{_interval(loaded['perplexity_ratio'], '.4f')} x"
        rows += [
            (f"perplexity, {named}", "", f"{loaded['child_perplexity']:.4f}", ratio),
            (f"KL, {named}", "", _interval(loaded["kl_nats"], ".3g"), ""),
            (f"same greedy token, {named}", "", _interval(loaded["greedy_agreement"], ".3f"), ""),
        ]
    speed = report["speed"]
    for key, name, pattern in (
        ("memory_bytes", "MB in memory", ".1f"),
        ("prefill_tokens_per_s", "prefill, tokens/s", ".1f"),
        ("decode_tokens_per_s", "decode, tokens/s", ".1f"),
        ("decode_cpu_ms_per_token", "decode, CPU-ms/token", ".1f"),
    ):
        if not speed:
            continue
        scale = 1e6 if key == "memory_bytes" else 1.0
        before = speed["parent"][key] / scale
        parent, children = f"{before:{pattern}}", [which for which in speed if which != "parent"]
        for which in children:
            after = speed[which][key] / scale
            ratio = f"{after / before:.2f} x" if before else ""
            of_child = name + _in(speed[which]["dtype"])
            rows.append((of_child, parent, f"{after:{pattern}}", ratio))
            parent = ""
    return rows


def _in(dtype: str | None) -> str:
    return "" if dtype is None else f" in {dtype}"


def _interval(described: dict[str, float | None], pattern: str) -> str:
    text = f"{described['mean']:{pattern}}"
    if described["low"] is not None and described["high"] is not None:
        text += f" [{described['low']:{pattern}}, {described['high']:{pattern}}]"
    return text


def plot_pareto(out: Path) -> Path | None:
    """Plots KL over bytes on disk for a compression and comparable ones beside it.

    Args:
        out: Folder of one compression, with a folder for each target. Compressions beside it are
            plotted as well if they are of the same parent and were compared on the same text.

    Returns:
        File of the plot, beside `out`; None if there is only one artifact.
    """
    folder = out.parent
    ours, *_ = sorted(out.glob("*/compression.json"))
    files = sorted(folder.glob("*/*/compression.json"))
    reports = [report for report in map(_read, files) if _basis(report) == _basis(_read(ours))]
    if len(reports) < 2:
        return None
    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.5))
    colors = plt.colormaps["tab20"].colors  # type: ignore[attr-defined]
    points = []
    for number, report in enumerate(reports):
        kl = report["evaluation"]["kl_nats"]
        x, y = report["weight_bytes"] / 1e6, max(kl["mean"], 1e-6)
        low = y if kl["low"] is None else max(kl["low"], 1e-7)
        high = y if kl["high"] is None else kl["high"]
        label = f"{report['recipe']} ({report['target']})"
        points.append((x, y))
        ax.errorbar(
            x,
            y,
            yerr=[[max(y - low, 0)], [max(high - y, 0)]],
            marker="osD^v"[number // len(colors) % 5],
            color=colors[number % len(colors)],
            linestyle="none",
            label=label,
        )
    # The Pareto front: no other artifact is both as small and as close to the parent.
    best = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    ax.plot(*zip(*sorted(best), strict=True), linestyle=":", color="gray", zorder=0)
    ax.set_yscale("log")
    ax.set_xlabel("weights on disk, MB")
    ax.set_ylabel("KL to the parent, nats/token")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    out = folder / "pareto.png"
    figure.savefig(out, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return out


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _basis(report: dict[str, Any]) -> tuple[object, ...]:
    """Returns what comparable compressions share: the parent, and the text of the evaluation."""
    evaluation = report["evaluation"]
    parent = report["made_from"]["parent"]
    return parent, evaluation["data_digest"], evaluation["parent_perplexity"]
