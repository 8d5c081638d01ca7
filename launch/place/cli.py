"""The command line of `python -m launch up`, `render`, `status`, `logs` and `down`."""

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError, ExitCode
from launch.words import add_words, settings_of

if TYPE_CHECKING:
    from launch.config import LaunchConfig
    from launch.place.place import Job, Place
    from launch.settings import Settings

_UP = """\
Plans the job and writes it for launch.target: as a SkyPilot task with the best places in order
(sky), a batch script (slurm), a JobSet (kubernetes) or a command (local). `up` then starts it. On
SkyPilot it is a managed job, which is started again elsewhere when its machines are lost, but not
when it fails. SkyPilot needs an environment of its own: pip install 'skypilot[aws,gcp]==0.14.1'
there, and put it into PATH or name it in launch.sky."""

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
        commands: Object that `add_subparsers` returned.
    """
    render = commands.add_parser(
        "render", help="write the job as a file for its target", description=_UP, epilog=_EXAMPLES
    )
    render.set_defaults(run=_render)
    render.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: print it")
    up = commands.add_parser(
        "up", help="start the job in the cheapest place", description=_UP, epilog=_EXAMPLES
    )
    up.set_defaults(run=_up)
    for parser in (render, up):
        add_words(parser, "the job and launch.*")
    status = commands.add_parser("status", help="show the jobs of the target")
    logs = commands.add_parser("logs", help="show the output of a job")
    down = commands.add_parser("down", help="end a job and release its machines")
    for parser in (logs, down):
        parser.add_argument("name", help="name of the job (launch.name)")
    for parser, run in ((status, _status), (logs, _logs), (down, _down)):
        parser.set_defaults(run=run)
        add_words(parser, "settings under launch., e.g. launch.target=slurm")


def place_of(launch: "LaunchConfig") -> "Place":
    """Returns the place that `launch.target` names.

    Raises:
        ConfigError: The target is this machine, which is not a place.
    """
    from launch.config import Target

    if launch.target is Target.slurm:
        from launch.place.slurm import Slurm

        return Slurm(launch)
    if launch.target is Target.kubernetes:
        from launch.place.kubernetes import Kubernetes

        return Kubernetes(launch)
    if launch.target is Target.sky:
        from launch.place.skypilot import SkyPilot

        return SkyPilot(launch)
    rule = "a job on this machine is controlled in its own terminal"
    raise ConfigError("launch.target", "local", rule, "press Ctrl-C there, or read its output")


def _job(
    settings: "Settings", place: "Place", config_dir: Path | None, planned: float | None
) -> "Job":
    """Plans the job, and returns it for the place."""
    from launch.catalog.catalog import load_catalog, owned_catalog, today
    from launch.config import PoolKind, Target
    from launch.place.place import job_of
    from launch.plan.planner import make_plan

    if config_dir is not None and config_dir.is_absolute():
        rule = "does not exist on the job's machines"
        raise ConfigError("--config-dir", config_dir, rule, "give it within the workdir")
    launch = settings.launch
    if launch.target is Target.sky:
        catalog = load_catalog(launch, today())
    else:
        catalog = owned_catalog(launch, PoolKind[launch.target.value], today())
    return job_of(make_plan(settings, catalog), place, config_dir, planned)


def _is_here(launch: "LaunchConfig") -> bool:
    """Returns whether the job runs on this machine.

    Raises:
        ConfigError: It does, and has a budget.
    """
    from launch.config import Target

    if launch.target is not Target.local:
        return False
    if launch.budget_usd is not None:
        rule = "the price of this machine is unknown"
        fix = "give one: python -m launch guard --usd-per-h X --budget-usd Y -- COMMAND"
        raise ConfigError("launch.budget_usd", launch.budget_usd, rule, fix)
    return True


def _render(options: argparse.Namespace, rest: Sequence[str]) -> int:
    settings, config_dir = settings_of(options), options.config_dir
    if _is_here(settings.launch):
        folder = [] if config_dir is None else [f"--config-dir={config_dir}"]
        text = shlex.join(["python", "-m", "launch", "pipeline", *folder, *options.words]) + "\n"
    else:
        place = place_of(settings.launch)
        text = place.render(_job(settings, place, config_dir, None))
    if options.output is None:
        print(text, end="")
        return ExitCode.FINISHED
    try:
        options.output.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError("--output", options.output, str(e.strerror), "name another file") from e
    return ExitCode.FINISHED


def _up(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.pipeline.chain import chain_of

    settings = settings_of(options)
    if _is_here(settings.launch):
        return chain_of(settings, options.config_dir).run()
    place = place_of(settings.launch)
    job = _job(settings, place, options.config_dir, round(time.time()))
    return place.start(job, place.render(job))


def _status(options: argparse.Namespace, rest: Sequence[str]) -> int:
    return place_of(settings_of(options).launch).status()


def _logs(options: argparse.Namespace, rest: Sequence[str]) -> int:
    return place_of(settings_of(options).launch).logs(options.name)


def _down(options: argparse.Namespace, rest: Sequence[str]) -> int:
    return place_of(settings_of(options).launch).down(options.name)
