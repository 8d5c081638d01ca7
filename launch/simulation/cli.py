"""The command line of `python -m launch simulate`, which compares placement policies."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError, ExitCode

_LEAST = {
    **{"starts": 1, "seed": 0, "gang_size": 1, "compute_hours": 0.001, "checkpoint_gb": 0},
    **{"egress_usd_per_gb": 0, "spot_usd": 0, "on_demand_usd": 0.001},
}
_MOST = 1e9

if TYPE_CHECKING:
    from launch.simulation.study import Row

_SIMULATE = """\
Replays traces of a spot market (availability and, if present, prices) with each placement policy,
from many random moments, and compares their cost with the least possible one, which needs to know
the future. Without traces, it simulates a market of three zones."""

_EXAMPLES = """\
a job of 48 h on one of three zones, with a quarter more time than it needs:
  python -m launch simulate us-east-1a.json us-east-1c.json us-west-2b.json \\
      --compute-hours 48 --deadline-over-compute 1.25

A trace is JSON: {"metadata": {"gap_seconds": 300}, "data": [nodes at each point]}; beside data may
be spot_usd_per_h and on_demand_usd_per_h, one price per point. All traces begin at the same time.
"""


def add_verbs(commands: Any) -> None:
    """Adds `simulate` to the parsers of `python -m launch`.

    Args:
        commands: Object that `add_subparsers` returned.
    """
    parser = commands.add_parser(
        "simulate",
        help="compare the cost of policies for spot machines",
        description=_SIMULATE,
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=_simulate)
    parser.add_argument(
        "traces", metavar="TRACE", nargs="*", type=Path, help="one file for each zone"
    )
    for name, default, what in (
        ("compute-hours", 48.0, "hours that the job computes for"),
        ("restart-hours", 0.1, "hours that a start takes"),
        ("checkpoint-interval-hours", 0.5, "hours of progress between two checkpoints"),
        ("checkpoint-gb", 50.0, "gigabytes that go to another region with the job"),
        ("egress-usd-per-gb", 0.02, "price of a gigabyte that goes to another region"),
        ("spot-usd", 0.918, "spot price of a node-hour, where a trace has none"),
        ("on-demand-usd", 3.06, "on-demand price of a node-hour, where a trace has none"),
    ):
        help_text = f"{what} (default: {default:g})"
        parser.add_argument(f"--{name}", metavar="X", type=float, default=default, help=help_text)
    parser.add_argument(
        "--deadline-over-compute",
        metavar="X",
        type=float,
        nargs="+",
        default=[1.08, 1.25, 1.5, 1.92],
        help="time until the deadline, by compute hours (default: 1.08 1.25 1.5 1.92)",
    )
    for name, default_count, what in (
        ("gang-size", 1, "nodes that the job needs, all at once"),
        ("starts", 200, "random moments to begin at"),
        ("seed", 0, "seed of the moments"),
    ):
        help_text = f"{what} (default: {default_count})"
        parser.add_argument(
            f"--{name}", metavar="N", type=int, default=default_count, help=help_text
        )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _simulate(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.simulation.market import markov_market, read_market  # here: numpy is slow to import
    from launch.simulation.simulate import Job
    from launch.simulation.study import compare

    for name, least in _LEAST.items():
        if not least <= getattr(options, name) <= _MOST:
            key, rule = "--" + name.replace("_", "-"), f"must be from {least:g} to {_MOST:g}"
            raise ConfigError(key, getattr(options, name), rule, "give a number in this range")
    if options.traces:
        prices = (options.spot_usd, options.on_demand_usd, options.egress_usd_per_gb)
        market = read_market(options.traces, *prices)
    else:
        ticks = 12 * 24 * 30  # 30 days of 5 minutes
        up_h, down_h = (1.5, 4.0, 8.0), (1.5, 1.5, 1.0)
        market = markov_market(options.seed, ticks, up_h, down_h, 300.0, options.gang_size)
    jobs = [
        Job(
            options.compute_hours,
            options.compute_hours * ratio,
            options.gang_size,
            options.restart_hours,
            options.checkpoint_interval_hours,
            options.checkpoint_gb,
        )
        for ratio in options.deadline_over_compute
    ]
    found: list[dict[str, Any]] = []
    for ratio, job in zip(options.deadline_over_compute, jobs, strict=True):
        rows = compare(market, job, options.starts, options.seed)
        if not options.json:
            print(_table(f"deadline / compute = {ratio:g}", rows), flush=True)
        found += [{"deadline_over_compute": ratio, **vars(row)} for row in rows]
    if options.json:
        print(json.dumps(found, indent=1))
    return ExitCode.FINISHED


def _table(title: str, rows: "list[Row]") -> str:
    lines = [
        title,
        f"  {'policy':<18}{'saving':>8}{'worst':>8}{'missed':>8}{'cost $':>9}{'starts':>8}"
        f"{'moves':>7}{'lost h':>8}{'spot h':>8}{'on-dem h':>10}{'idle h':>8}",
    ]
    for row in rows:
        saving = f"{row.saving:.1%}" if row.missed == 0 else "-"
        worst = f"{row.worst_saving:.1%}" if row.missed == 0 else "-"
        line = f"  {row.policy:<18}{saving:>8}{worst:>8}{row.missed:>8.1%}{row.cost_usd:>9.2f}"
        if row.starts is not None:
            line += f"{row.starts:>8.1f}{row.migrations:>7.1f}{row.lost_h:>8.1f}"
            line += f"{row.spot_h:>8.1f}{row.on_demand_h:>10.1f}{row.idle_h:>8.1f}"
        lines.append(line)
    return "\n".join(lines) + "\n"
