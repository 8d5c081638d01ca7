"""Measures what a 48-hour job saves with each placement policy, on traces of a real spot market.

    python -m benchmarks.bench_policies --tuned 2023-02/*.json --untouched 2023-08/*.json

The traces are those of the Can't Be Late study (Wu et al., NSDI 2024; not part of this repository):
V100 nodes on AWS. The prior of our policy comes from the pooled rates of the traces `--tuned`; its
authors never looked at the traces `--untouched`. There are five scenes:

    plain     the tuned traces, with starts as the only overhead
    full      also with lost work (a checkpoint every half hour of progress) and egress (50 GB)
    untouched the same on the other traces, with a gang of 4
    prices    the same on a synthetic market of three regions whose spot prices change
    known     the same on synthetic memoryless markets of one zone, with the mean durations of the
              tuned ones, and with a policy that knows their rates: what it pays above the oracle
              is the price of not knowing the future

Spot costs 30% of on-demand where a trace has no prices. Prints a table, and writes
`benchmarks/results/policies.json` and `policies.png` after each cell.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.informed import informed
from core.errors import ConfigError
from core.settings.options import OptionParser
from launch.simulation.market import SPOT_SHARE, Market, markov_market, read_market
from launch.simulation.simulate import Job, MakePolicy
from launch.simulation.study import ORACLE, OURS, POLICIES, Row, compare
from monitoring.environment import describe_environment

RESULT = Path("benchmarks/results/policies.json")
PLOT = RESULT.with_suffix(".png")
INFORMED = "knows the rates"
RATIOS = (1.08, 1.25, 1.50, 1.92)
COMPUTE_H = 48.0
RESTART_H = 0.1
TIGHT, GOOD = "us-east-1c", "us-west-2b"
PLAIN = {"checkpoint_interval_h": 0.0, "checkpoint_gb": 0.0}
FULL = {"checkpoint_interval_h": 0.5, "checkpoint_gb": 50.0}


@dataclass(frozen=True)
class Scene:
    """Describes a market, and the job except its deadline."""

    name: str
    place: str
    market: Market
    gang_size: int
    overheads: dict[str, float]
    policies: Mapping[str, MakePolicy] = field(default_factory=lambda: POLICIES)
    share_of_starts: float = 1.0  # smaller where our policy makes hundreds of plans for one job


def scenes(tuned: Sequence[Path], untouched: Sequence[Path]) -> Iterator[Scene]:
    """Yields the scenes to run, the most informative first."""
    if tuned:
        market = read_market(tuned)
        for name in (TIGHT, GOOD):
            if name not in market.zones:
                raise ConfigError("--tuned", name, "the trace of this zone is missing", "add it")
        places = {
            f"tight ({TIGHT})": market.only([market.zones.index(TIGHT)]),
            f"good ({GOOD})": market.only([market.zones.index(GOOD)]),
            f"all {len(market.zones)} zones": market,
        }
        for name, overheads in (("full", FULL), ("plain", PLAIN)):
            for place, part in places.items():
                yield Scene(name, place, part, 1, overheads)
    for path in untouched:
        market = read_market([path])
        yield Scene("untouched", market.zones[0], market, 4, FULL)
    up_h, down_h = (2.0, 4.0, 6.0), (3.0, 3.0, 2.0)
    market = markov_market(1, 20_000, up_h, down_h, 300.0, 1, price_change_h=12.0, num_regions=3)
    yield Scene("prices", "3 regions", market, 1, FULL, share_of_starts=0.2)
    for name in (TIGHT, GOOD) if tuned else ():
        # Memoryless, so that there is a best policy without foresight to compare with.
        traces = read_market(tuned)
        up, down = spells_h(traces.only([traces.zones.index(name)]))
        market = markov_market(1, 20_000, [up], [down], 300.0)
        policies = {**POLICIES, INFORMED: informed(up, down, SPOT_SHARE)}
        yield Scene("known", f"like {name}", market, 1, FULL, policies)


def spells_h(market: Market) -> tuple[float, float]:
    """Returns the mean hours for which the first zone of a market has spot, and has none."""
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for is_up, ticks in groupby((market.nodes[:, 0] > 0).tolist()):
        lengths[is_up].append(len(list(ticks)))
    up, down = (sum(spells) / len(spells) * market.gap_h for spells in lengths.values())
    return up, down


def run_cell(scene: Scene, ratio: float, num_starts: int) -> dict[str, Any]:
    """Runs one deadline in one scene."""
    began = time.monotonic()
    job = Job(COMPUTE_H, COMPUTE_H * ratio, scene.gang_size, RESTART_H, **scene.overheads)
    num_starts = round(num_starts * scene.share_of_starts)
    rows = compare(scene.market, job, num_starts, policies=scene.policies)
    return {
        "scene": scene.name,
        "place": scene.place,
        "deadline_over_compute": ratio,
        "starts": num_starts,
        "goals": goals(rows),
        "rows": [asdict(row) for row in rows],
        "seconds": round(time.monotonic() - began, 1),
    }


def goals(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns whether our policy was in time, and its savings against the best other one."""
    by_name = {row.policy: row for row in rows}
    ours, oracle = by_name[OURS], by_name[ORACLE]
    others = [row for row in rows if row.policy not in (OURS, INFORMED, ORACLE)]
    # A policy that misses deadlines can save any amount, so only punctual ones compare.
    best = max((row for row in others if row.missed == 0), key=lambda row: row.saving)
    informed_row = by_name.get(INFORMED)
    of_future = {}
    if informed_row is not None:
        of_future = {"price_of_the_future": round(informed_row.cost_usd / oracle.cost_usd - 1, 4)}
    return of_future | {
        "no_deadline_missed": ours.missed == 0,
        "best_other": best.policy,
        "ahead_of_best_other": round(ours.saving - best.saving, 4),
        "cost_over_oracle": round(ours.cost_usd / oracle.cost_usd - 1, 4),
    }


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Returns the savings by policy as Markdown; `-` where a deadline was missed."""
    shown = ("failover", "eager", "greedy", "uniform progress", OURS, INFORMED, ORACLE)
    lines = [
        f"| scene | place | deadline / compute | {' | '.join(shown)} | cost over oracle |",
        "|---" * (len(shown) + 4) + "|",
    ]
    for cell in cells:
        rows = {row["policy"]: row for row in cell["rows"]}
        in_time = {name: row for name, row in rows.items() if row["missed"] == 0}
        savings = [f"{in_time[p]['saving']:.1%}" if p in in_time else "-" for p in shown]
        over = f"{cell['goals']['cost_over_oracle']:+.1%}"
        ratio = f"{cell['deadline_over_compute']:.2f}"
        lines.append(f"| {' | '.join([cell['scene'], cell['place'], ratio, *savings, over])} |")
    return "\n".join(lines)


def plot(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots savings over deadline / compute, with one panel per scene and place."""
    # This backend needs no display.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((cell["scene"], cell["place"]) for cell in cells))
    columns = min(3, len(panels))
    num_rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        num_rows, columns, figsize=(4.2 * columns, 3 * num_rows), squeeze=False
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, panel in zip(axes.flat, panels, strict=False):
        chosen = [cell for cell in cells if (cell["scene"], cell["place"]) == panel]
        for name in ("greedy", "uniform progress", OURS, ORACLE):
            rows = [next(r for r in cell["rows"] if r["policy"] == name) for cell in chosen]
            ax.errorbar(
                [cell["deadline_over_compute"] for cell in chosen],
                [100 * row["saving"] for row in rows],
                yerr=[100 * row["saving_error"] for row in rows],
                label=name,
                linestyle="--" if name == ORACLE else "-",
                marker="o",
                markersize=3,
            )
        ax.set_title(": ".join(panel), fontsize=9)
        ax.set_xlabel("deadline / compute", fontsize=8)
        ax.set_ylabel("saving, %", fontsize=8)
        ax.tick_params(labelsize=8)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Runs the command line."""
    parser = OptionParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tuned", type=Path, nargs="+", default=[], metavar="TRACE")
    parser.add_argument("--untouched", type=Path, nargs="+", default=[], metavar="TRACE")
    parser.add_argument("--starts", type=int, default=200, help="per cell (default: 200)")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    cells: list[dict[str, Any]] = []
    result = {"environment": describe_environment(), "starts": options.starts, "cells": cells}
    result["job"] = {"compute_h": COMPUTE_H, "restart_h": RESTART_H, "plain": PLAIN, "full": FULL}
    options.result.parent.mkdir(parents=True, exist_ok=True)
    for scene in scenes(sorted(options.tuned), sorted(options.untouched)):
        for ratio in RATIOS:
            cells.append(run_cell(scene, ratio, options.starts))
            # After each cell, since all of them take hours.
            options.result.write_text(json.dumps(result, indent=1) + "\n")
            print(table(cells[-1:]).splitlines()[-1], f"({cells[-1]['seconds']} s)", flush=True)
    plot(cells, options.result.with_suffix(".png"))
    print(table(cells))


if __name__ == "__main__":
    main()
