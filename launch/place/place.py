"""Where a job can be placed, and what a place can do with it."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from core.errors import ConfigError
from launch.config import LaunchConfig, Stage, Target
from launch.pipeline.stages import check_stages
from launch.place.job import Job
from launch.plan.candidate import Candidate
from launch.plan.planner import Plan
from launch.settings import Settings

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class Storage:
    """Where a job keeps what it makes.

    Attributes:
        run_dir: Of the trainer, as the machines see it.
        kept_at: A folder that outlives the machines, of a store to which files are copied; None:
            `run_dir` outlives them.
    """

    run_dir: Path
    kept_at: str | None = None


class Place(Protocol):
    """What runs jobs on machines that are not this one."""

    def usable(self, plan: Plan) -> list[Candidate]:
        """Those of a plan's candidates that can be had here, best first; at least one.

        Raises:
            ConfigError: There is none.
        """

    def storage(self, name: str, settings: Settings, ways: Sequence[Candidate]) -> Storage:
        """Where a job of that name keeps what it makes.

        Raises:
            ConfigError: Nowhere that outlives its machines.
        """

    def render(self, job: Job) -> str:
        """The job in this place's own language: a file that does not need this project."""

    def start(self, job: Job, text: str) -> int:
        """Hands over what `render` has made. Returns 0, or 1 where that failed."""

    def status(self) -> int:
        """Shows the jobs that are there."""

    def logs(self, name: str) -> int:
        """Shows what a job prints."""

    def down(self, name: str) -> int:
        """Ends a job, and its machines where they are rented."""


def place_of(launch: LaunchConfig) -> Place:
    """The place that `launch.target` names.

    Raises:
        ConfigError: It is this machine.
    """
    if launch.target is Target.slurm:
        from launch.place.slurm import Slurm

        return Slurm(launch)
    if launch.target is Target.kubernetes:
        from launch.place.kubernetes import Kubernetes

        return Kubernetes(launch)
    if launch.target is Target.sky:
        from launch.place.skypilot import SkyPilot

        return SkyPilot(launch)
    rule = "a job on this machine is its own terminal's"
    raise ConfigError("launch.target", "local", rule, "press Ctrl-C there, or read it there")


def job_of(
    plan: Plan,
    place: Place,
    config_dir: Path | None = None,
    time: float | None = None,
) -> Job:
    """The job that a plan comes to.

    Args:
        plan: Of the job.
        place: Where it goes.
        config_dir: See `Job`.
        time: See `Job`.

    Raises:
        ConfigError: It cannot be placed as it is: its name, or nowhere to keep its checkpoints.
    """
    launch, trainer = plan.settings.launch, plan.settings.trainer
    check_stages(plan.settings)
    if launch.stages != [Stage.train] and launch.target is not Target.sky:
        shown = f"[{','.join(stage.value for stage in launch.stages)}]"
        rule = f"launch.target={launch.target.value} places training only"
        raise ConfigError("launch.stages", shown, rule, "use [train], and `pipeline` for the rest")
    name = launch.name or re.sub(r"[^a-z0-9]+", "-", trainer.run_dir.name.lower()).strip("-")
    if not _NAME.fullmatch(name):
        rule = "is no name: up to 40 of a-z, 0-9 and -, a letter first"
        raise ConfigError("launch.name", name, rule, "set launch.name")
    usable = place.usable(plan)
    same_size = [way for way in usable if way.num_nodes == usable[0].num_nodes]
    ways = same_size[: launch.candidates]
    storage = place.storage(name, plan.settings, ways)
    return Job(
        name=name,
        candidates=tuple(ways),
        run_dir=storage.run_dir,
        kept_at=storage.kept_at,
        overrides=plan.settings.overrides,
        launch=launch,
        total_tokens=plan.workload.total_tokens,
        config_dir=config_dir,
        time=time,
    )


def check_secrets(launch: LaunchConfig) -> None:
    """Raises ConfigError where a secret that goes along has no value here."""
    for name in launch.secrets:
        if not os.environ.get(name):
            rule = "no such environment variable here"
            raise ConfigError("launch.secrets", name, rule, f"export {name}=...")


def of_one_pool(plan: Plan) -> list[Candidate]:
    """The candidates on the best of owned pools, best first: a job does not span two."""
    best = plan.candidates[0].offer.pool
    return [way for way in plan.candidates if way.offer.pool == best]


def refuse_unused(launch: LaunchConfig, *names: str) -> None:
    """Raises ConfigError where one of these settings, which the target does not use, is given."""
    for name in names:
        if getattr(launch, name) is not None:
            rule = f"has no meaning for launch.target={launch.target.value}"
            fix = "leave it out"
            if name == "bucket":
                fix += "; checkpoint.upload=URL copies checkpoints to a store"
            raise ConfigError(f"launch.{name}", getattr(launch, name), rule, fix)
