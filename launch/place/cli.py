"""`python -m launch up | render | status | logs | down`: what they take."""

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError, ExitCode
from launch.words import add_words, settings_of

_UP = """\
Plans the job and writes it in the language of launch.target: a SkyPilot task with the best places
in order (sky), a batch script (slurm), a JobSet (kubernetes), a command (local). `up` then starts
it: on SkyPilot as a managed job, started again elsewhere when its machines are lost, and not when
it fails. SkyPilot is a program of its own environment: pip install 'skypilot[aws,gcp]==0.14.1'
there, and have it in PATH or named by launch.sky."""

_EXAMPLES = """\
example:
  python -m launch render --config-dir conf experiment=mine launch.bucket=s3://mine -o job.yaml
  python -m launch up --config-dir conf experiment=mine launch.bucket=s3://mine
  python -m launch up --config-dir conf experiment=mine launch.target=slurm \\
      'launch.pools={hpc:{kind:slurm,gpu:A100-80GB,gpus_per_node:8,nodes:2,usd_per_h:3}}'
  python -m launch logs mine launch.target=slurm

exit codes: 0 done; 2 refused, nothing was started; 1 the place's own program failed
"""


def add_verbs(commands: Any) -> None:
    """Adds the verbs to the parsers of `python -m launch`.

    Args:
        commands: What `add_subparsers` returned.
    """
    render = commands.add_parser(
        "render", help="write the job as the place takes it", description=_UP, epilog=_EXAMPLES
    )
    render.set_defaults(run=_render)
    render.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: print it")
    up = commands.add_parser(
        "up", help="start the job where it is cheapest", description=_UP, epilog=_EXAMPLES
    )
    up.set_defaults(run=_up)
    for parser in (render, up):
        add_words(parser, "the job and launch.*")
    status = commands.add_parser("status", help="the jobs that were started, as their place says")
    logs = commands.add_parser("logs", help="what a job prints")
    down = commands.add_parser("down", help="end a job and its machines")
    for parser in (logs, down):
        parser.add_argument("name", help="of the job: launch.name")
    for parser, run in ((status, _status), (logs, _logs), (down, _down)):
        parser.set_defaults(run=run)
        add_words(parser, "of launch.*: launch.target=slurm, ...")


def _job(options: argparse.Namespace, settings: Any, planned: float | None) -> Any:
    """The place, and the job for it."""
    from launch.catalog.catalog import load_catalog, owned_catalog, today
    from launch.config import PoolKind, Target
    from launch.place.place import job_of, place_of
    from launch.plan.planner import make_plan

    place = place_of(settings.launch)
    if options.config_dir is not None and options.config_dir.is_absolute():
        rule = "is not on the job's machines"
        raise ConfigError("--config-dir", options.config_dir, rule, "name it within the workdir")
    launch = settings.launch
    if launch.target is Target.sky:
        catalog = load_catalog(launch, today())
    else:
        catalog = owned_catalog(launch, PoolKind[launch.target.value], today())
    plan = make_plan(settings, catalog)
    return place, job_of(plan, place, options.config_dir, planned)


def _here(settings: Any, options: argparse.Namespace) -> list[str] | None:
    """The words of `pipeline`, where the job is to run on this machine."""
    from launch.config import Target

    if settings.launch.target is not Target.local:
        return None
    if settings.launch.budget_usd is not None:
        rule = "an hour of this machine has no price"
        fix = "say one: python -m launch guard --usd-per-h X --budget-usd Y -- COMMAND"
        raise ConfigError("launch.budget_usd", settings.launch.budget_usd, rule, fix)
    folder = [] if options.config_dir is None else [f"--config-dir={options.config_dir}"]
    return ["pipeline", *folder, *options.words]


def _render(options: argparse.Namespace, rest: Sequence[str]) -> int:
    settings = settings_of(options)
    if (words := _here(settings, options)) is not None:
        text = shlex.join(["python", "-m", "launch", *words]) + "\n"
    else:
        place, job = _job(options, settings, None)
        text = place.render(job)
    if options.output is None:
        print(text, end="")
        return ExitCode.FINISHED
    try:
        options.output.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError("--output", options.output, str(e.strerror), "name another file") from e
    return ExitCode.FINISHED


def _up(options: argparse.Namespace, rest: Sequence[str]) -> int:
    settings = settings_of(options)
    if (words := _here(settings, options)) is not None:
        from launch.__main__ import main

        return main(words)
    place, job = _job(options, settings, round(time.time()))
    code: int = place.start(job, place.render(job))
    return code


def _status(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.place.place import place_of

    return place_of(settings_of(options).launch).status()


def _logs(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.place.place import place_of

    return place_of(settings_of(options).launch).logs(options.name)


def _down(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.place.place import place_of

    return place_of(settings_of(options).launch).down(options.name)
