"""The command line of `python -m launch guard` and `python -m launch cost`."""

import argparse
import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.settings.options import number

_GUARD = """\
Runs COMMAND on a rented machine, records its cost tick by tick, and stops it in time to save before
the budget is spent, over all starts and all machines. With several nodes only the first one runs
the guard, which pays for all."""

_EXAMPLES = """\
example:
  python -m launch guard --usd-per-h 2.1 --budget-usd 200 --ledger /ckpt/ledger \\
      --run-dir /ckpt/run -- python -m trainer experiment=mine run.dir=/ckpt/run

In a SkyPilot job SPOTFORGE_PRICES may hold the prices of all places where it may run: a JSON list
of {cloud, region, zone, gpu, gpus_per_node, is_spot, usd_per_h}. The dearest of those that may be
this machine's counts.

exit codes: COMMAND's; 2 at the budget, with a complete checkpoint
"""


def add_verbs(commands: Any) -> None:
    """Adds `guard` and `cost` to the parsers of `python -m launch`.

    Args:
        commands: Object that `add_subparsers` returned.
    """
    _add_guard(commands)
    cost = commands.add_parser(
        "cost",
        help="show what a job has cost and will cost, from its ledger",
        description="Shows a ledger: spent, expected and forecast sums, dollars per million "
        "tokens, and a table by place.",
    )
    cost.set_defaults(run=_cost)
    cost.add_argument("ledger", metavar="DIR", type=_folder, help="folder that guard writes to")


def _add_guard(commands: Any) -> None:
    parser = commands.add_parser(
        "guard",
        help="run a command, record its cost, stop it at the budget",
        usage="python -m launch guard [options] --ledger DIR -- COMMAND...",
        description=_GUARD,
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=_guard, refuse=parser.error)
    parser.add_argument(
        "--ledger",
        metavar="DIR",
        type=_folder,
        required=True,
        help="folder that records what was spent",
    )
    price = parser.add_mutually_exclusive_group()
    price.add_argument("--usd-per-h", metavar="X", type=number(0), help="price of a node-hour")
    price.add_argument(
        "--prices", metavar="FILE", type=Path, help="prices by place (default: SPOTFORGE_PRICES)"
    )
    parser.add_argument(
        "--nodes", metavar="N", help="nodes to pay for (default: SKYPILOT_NUM_NODES or 1)"
    )
    parser.add_argument(
        "--budget-usd",
        metavar="X",
        type=number(),
        default=math.inf,
        help="what the job may cost in all its starts (default: no limit)",
    )
    parser.add_argument(
        "--run-dir", metavar="DIR", type=_folder, help="run directory of the trainer"
    )
    parser.add_argument(
        "--deadline-h",
        metavar="X",
        type=number(),
        default=math.inf,
        help="hours from the estimate, else from the first start, to the deadline",
    )
    parser.add_argument(
        "--estimate",
        metavar="JSON",
        help='what the plan expects, e.g. {"usd": 180, "p50_h": 30, "p95_h": 41, "tokens": 2e9}',
    )
    parser.add_argument(
        "--since-boot",
        action="store_true",
        help="pay also for the time since this machine booted",
    )
    for name, default_s, what in (
        ("tick", 60, "between two entries of the ledger"),
        ("stop", 120, "to reserve for a stop, at least: the current step and a save"),
    ):
        parser.add_argument(
            f"--{name}-s",
            metavar="S",
            type=number(),
            default=float(default_s),
            help=f"seconds {what} (default: {default_s})",
        )


def _cost(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.budget.summary import summary

    print(summary(options.ledger))
    return 0


def _guard(options: argparse.Namespace, command: Sequence[str]) -> int:
    if not command:
        options.refuse("say what to run: -- COMMAND...")
    from core.process.child import check_program
    from launch.budget.guard import Guard, GuardSettings

    check_program(command)
    num_nodes = _num_nodes(options)
    usd_per_h, place, is_spot = _price(options)
    return Guard(
        GuardSettings(
            command=command,
            usd_per_h=usd_per_h * num_nodes,
            place=place,
            nodes=num_nodes,
            is_spot=is_spot,
            ledger=options.ledger,
            run_dir=options.run_dir,
            budget_usd=options.budget_usd,
            deadline_h=options.deadline_h,
            estimate=_estimate(options.estimate),
            tick_s=options.tick_s,
            stop_s=options.stop_s,
            since_boot=options.since_boot,
        )
    ).run()


def _num_nodes(options: argparse.Namespace) -> int:
    """Returns the number of nodes to pay for."""
    rank = os.environ.get("SKYPILOT_NODE_RANK", "0")
    if rank != "0":
        rule, fix = "must be 0: the first node pays for all", "run COMMAND without a guard here"
        raise ConfigError("SKYPILOT_NODE_RANK", rank, rule, fix)
    key, text = "--nodes", options.nodes
    if text is None:
        key, text = "SKYPILOT_NUM_NODES", os.environ.get("SKYPILOT_NUM_NODES", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(key, text, "must be a whole number of at least 1", "give 1 or more")
    return int(text)


def _price(options: argparse.Namespace) -> tuple[float, str, bool]:
    """Returns the dollars for an hour of one node, its place, and whether it is spot."""
    from launch.budget.prices import gpu_here, parse_prices, price_here
    from launch.elastic.journal import say

    if options.usd_per_h is not None:
        return options.usd_per_h, socket.gethostname(), False
    if options.prices is not None:
        try:
            source, text = "--prices", options.prices.read_text("utf-8", "replace")
        except OSError as e:
            raise ConfigError("--prices", options.prices, f"{e.strerror}", "check the path") from e
    else:
        source, text = "SPOTFORGE_PRICES", os.environ.get("SPOTFORGE_PRICES", "")
        if not text:
            options.refuse("the price is missing: give --usd-per-h, --prices or SPOTFORGE_PRICES")
    prices = parse_prices(source, text)
    price, remark = price_here(prices, os.environ, gpu_here())
    if remark is not None:
        say("guard", remark)
    return price.usd_per_h, price.place, price.is_spot


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is not the name of a folder")
    return Path(text)


def _estimate(text: str | None) -> dict[str, float]:
    """Returns the figures of the estimate; empty without one."""
    import json

    from launch.budget.ledger import ESTIMATE

    if text is None:
        return {}
    fix = f"give some of time, {', '.join(ESTIMATE)}"
    try:
        figures = {str(key): float(value) for key, value in json.loads(text).items()}
    except (ValueError, RecursionError, AttributeError, TypeError) as e:
        raise ConfigError("--estimate", text, "is not a JSON object of numbers", fix) from e
    unknown = sorted(set(figures) - {*ESTIMATE, "time"})
    if unknown:
        raise ConfigError("--estimate", text, f"has the unknown field {unknown[0]}", fix)
    if not all(0 <= value < math.inf for value in figures.values()):
        raise ConfigError("--estimate", text, "must have finite numbers of at least 0", fix)
    return figures
