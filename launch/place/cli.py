"""`python -m launch up | render | status | logs | down`: what they take."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monitoring.errors import ConfigError, ExitCode

_UP = """\
Plans the job, writes it as a SkyPilot task with the best places in order, and (up) starts it as a
managed job: started again elsewhere when its machines are lost, and not when it fails. SkyPilot is
a program of its own environment: pip install 'skypilot[aws,gcp]==0.14.1' there; --sky or PATH."""

_EXAMPLES = """\
example:
  python -m launch render experiment=mine launch.bucket=s3://mine -o job.yaml
  python -m launch up experiment=mine launch.bucket=s3://mine launch.budget_usd=200

exit codes: 0 done; 2 refused, nothing was started; 1 SkyPilot failed
"""


def add_verbs(commands: Any) -> None:
    """Adds the verbs to the parsers of `python -m launch`.

    Args:
        commands: What `add_subparsers` returned.
    """
    render = commands.add_parser(
        "render", help="write the job as a SkyPilot task", description=_UP, epilog=_EXAMPLES
    )
    render.set_defaults(run=_render)
    render.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: print it")
    up = commands.add_parser(
        "up", help="start the job where it is cheapest", description=_UP, epilog=_EXAMPLES
    )
    up.set_defaults(run=_up)
    for parser in (render, up):
        parser.add_argument("words", metavar="key=value", nargs="*", help="the job and launch.*")
        parser.add_argument("--config-dir", metavar="DIR", type=Path, help="a folder with options")
    status = commands.add_parser("status", help="the jobs that were started, as SkyPilot has them")
    status.set_defaults(run=_status)
    logs = commands.add_parser("logs", help="what a job prints")
    logs.set_defaults(run=_logs)
    down = commands.add_parser("down", help="end a job and its machines")
    down.set_defaults(run=_down)
    for parser in (logs, down):
        parser.add_argument("name", help="of the job: launch.name")
    for parser in (up, status, logs, down):
        parser.add_argument("--sky", metavar="PROGRAM", default="sky", help="default: sky")


def _job(options: argparse.Namespace, planned: float | None) -> Any:
    from launch.catalog.catalog import load_catalog, today
    from launch.place.job import job_of
    from launch.place.skypilot import usable
    from launch.plan.planner import make_plan
    from launch.settings import compose_settings

    if options.config_dir is not None and options.config_dir.is_absolute():
        rule = "is not on the job's machines"
        raise ConfigError("--config-dir", options.config_dir, rule, "name it within the workdir")
    settings = compose_settings(options.words, options.config_dir)
    plan = make_plan(settings, load_catalog(settings.launch, today()))
    return job_of(plan, usable(plan), options.config_dir, planned)


def _render(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.place.skypilot import render

    text = render(_job(options, None))
    if options.output is None:
        print(text, end="")
        return ExitCode.FINISHED
    try:
        options.output.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError("--output", options.output, str(e.strerror), "name another file") from e
    return ExitCode.FINISHED


def _up(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.place.sky_program import SkyProgram
    from launch.place.skypilot import render

    sky = SkyProgram(options.sky)
    job = _job(options, round(time.time()))
    return sky.launch(job, render(job))


def _status(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.place.sky_program import SkyProgram

    return SkyProgram(options.sky).run("jobs", "queue")


def _logs(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.place.sky_program import SkyProgram

    return SkyProgram(options.sky).run("jobs", "logs", "--name", options.name)


def _down(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.place.sky_program import SkyProgram

    return SkyProgram(options.sky).run("jobs", "cancel", "--yes", "--name", options.name)
