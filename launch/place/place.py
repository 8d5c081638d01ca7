"""The interface of a place, which runs jobs, and the step from a plan to a job."""

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
    """The folders of a job.

    Attributes:
        run_dir: Run directory of the trainer, as the machines see it.
        kept_at: Folder for copies, which outlives the machines; None: `run_dir` outlives them.
    """

    run_dir: Path
    kept_at: str | None = None


class Place(Protocol):
    """A system that runs jobs on other machines."""

    def usable(self, plan: Plan) -> list[Candidate]:
        """Returns the candidates of a plan that this place offers, best first; at least one.

        Raises:
            ConfigError: The place offers none of the candidates.
        """

    def storage(self, name: str, settings: Settings, ways: Sequence[Candidate]) -> Storage:
        """Returns the folders of a job of that name.

        Raises:
            ConfigError: No folder would outlive the machines, or a setting has no effect here.
        """

    def render(self, job: Job) -> str:
        """Returns the job as a file of this place's own format, usable without this project."""

    def start(self, job: Job, text: str) -> int:
        """Submits the text that `render` returned; returns 0, or 1 if that failed."""

    def status(self) -> int:
        """Shows the jobs of this place; returns 0, or 1 if that failed."""

    def logs(self, name: str) -> int:
        """Shows the output of a job; returns 0, or 1 if that failed."""

    def down(self, name: str) -> int:
        """Ends a job and releases its rented machines; returns 0, or 1 if that failed."""


def place_of(launch: LaunchConfig) -> Place:
    """Returns the place that `launch.target` names.

    Raises:
        ConfigError: The target is this machine, which is not a place.
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
    rule = "a job on this machine is controlled in its own terminal"
    raise ConfigError("launch.target", "local", rule, "press Ctrl-C there, or read its output")


def job_of(
    plan: Plan,
    place: Place,
    config_dir: Path | None = None,
    time: float | None = None,
) -> Job:
    """Makes the job of a plan for a place.

    Args:
        plan: Plan of the job.
        place: Place that runs the job.
        config_dir: See `Job`.
        time: See `Job`.

    Raises:
        ConfigError: The stages or the name do not suit the place, or see `Place`.
    """
    launch, trainer = plan.settings.launch, plan.settings.trainer
    check_stages(plan.settings)
    if launch.stages != [Stage.train] and launch.target is not Target.sky:
        shown = f"[{','.join(stage.value for stage in launch.stages)}]"
        rule = f"launch.target={launch.target.value} places training only"
        raise ConfigError("launch.stages", shown, rule, "use [train], and `pipeline` for the rest")
    name = launch.name or re.sub(r"[^a-z0-9]+", "-", trainer.run_dir.name.lower()).strip("-")
    if not _NAME.fullmatch(name):
        rule = "must be 1 to 40 of a-z, 0-9 and -, with a letter first"
        raise ConfigError("launch.name", name, rule, "set launch.name")
    usable = place.usable(plan)
    # One rendered job has one number of nodes, so that it can move only among equal ones.
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
    """Raises ConfigError if a secret has no value in this environment."""
    for name in launch.secrets:
        if not os.environ.get(name):
            rule = "is not set in this environment"
            raise ConfigError("launch.secrets", name, rule, f"export {name}=...")


def of_one_pool(plan: Plan) -> list[Candidate]:
    """Returns the candidates on the best pool, best first: a job does not span two pools."""
    best = plan.candidates[0].offer.pool
    return [way for way in plan.candidates if way.offer.pool == best]


def refuse_unused(launch: LaunchConfig, *names: str) -> None:
    """Raises ConfigError if one of these settings is given, since the target does not use them."""
    for name in names:
        if getattr(launch, name) is not None:
            rule = f"has no effect with launch.target={launch.target.value}"
            fix = "leave it out"
            if name == "bucket":
                fix += "; checkpoint.upload=URL copies checkpoints to a store"
            raise ConfigError(f"launch.{name}", getattr(launch, name), rule, fix)
