"""The command line of `python -m launch plan`."""

import argparse
import datetime
from collections.abc import Sequence
from typing import Any

from core.errors import ExitCode
from core.settings.options import count
from launch.words import add_words, launch_keys, settings_of

_PLAN = """\
Ranks the candidates for a job (cloud, region, zone, GPU, number of nodes, spot or on-demand, or
owned machines) by expected total cost: compute, interruptions, egress, storage. The words are those
of python -m trainer; words that begin with launch. are for the launcher. Nothing is started."""

_EXAMPLES = """\
a job of your own (conf/experiment/mine.yaml; docs/launch.md has one), by when, and for how much:
  python -m launch plan --config-dir conf experiment=mine launch.deadline=36h launch.budget_usd=200
with the prices that come with this package, which are of May 2026:
  python -m launch plan experiment=stdlib launch.max_price_age=365d

exit codes: 0 there is a candidate; 2 refused, or the rules exclude all (names the rule to loosen)
"""


def add_verbs(commands: Any) -> None:
    """Adds `plan` to the parsers of `python -m launch`.

    Args:
        commands: Object that `add_subparsers` returned.
    """
    parser = commands.add_parser(
        "plan",
        help="rank the places for a job by cost",
        usage="python -m launch plan [options] [key=value ...]",
        description=_PLAN,
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=_plan)
    parser.more_help = launch_keys
    add_words(parser, "the job and launch.*")
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    parser.add_argument(
        "--top", metavar="N", type=count(), default=12, help="candidates to show (default: 12)"
    )
    parser.add_argument(
        "--rejected",
        action="store_true",
        help="show all rejected candidates, not one for each reason",
    )
    parser.add_argument(
        "--today",
        metavar="DATE",
        type=_date,
        default=None,
        help="date from which the age of prices is counted (default: today)",
    )


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.catalog.catalog import load_catalog, today  # here: importing Hydra is slow
    from launch.pipeline.stages import check_stages
    from launch.plan.planner import make_plan
    from launch.plan.report import as_json, table

    settings = settings_of(options, rest)
    check_stages(settings)
    catalog = load_catalog(settings.launch, options.today or today())
    plan = make_plan(settings, catalog)
    print(as_json(plan) if options.json else table(plan, options.top, options.rejected))
    return ExitCode.FINISHED


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date; write 2026-05-24") from e
