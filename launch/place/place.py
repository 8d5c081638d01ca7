"""A job, and the interface of a place that runs it."""

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from core.errors import ConfigError
from launch.config import LaunchConfig, Stage, Target
from launch.elastic.token import new_token
from launch.pipeline.stages import check_stages
from launch.plan.candidate import Candidate
from launch.plan.planner import Plan
from launch.settings import Settings
from parallel.launcher import SUPERVISOR_PORT, TOKEN_VARIABLE

MOUNT = "/spotforge"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class Storage:
    """The folders of a job.

    Attributes:
        run_dir: Run directory of the trainer, as the machines see it.
        kept_at: Folder for copies of checkpoints and the ledger, which outlives the machines; None:
            `run_dir` outlives them.
        on_loss: Cost of the loss of one of several nodes, in words.
    """

    run_dir: Path
    kept_at: str | None = None
    on_loss: str = "a lost node costs the steps since the last checkpoint"


@dataclass(frozen=True)
class Job:
    """A job that is ready to be placed. Its commands are lines of a shell.

    Attributes:
        name: Name of lower-case letters, digits and dashes.
        candidates: Candidates that may run the job, best first, all with the same number of nodes.
        storage: Folders of the job.
        overrides: Overrides of the trainer.
        launch: Settings of the launcher.
        total_tokens: Number of tokens to train on.
        config_dir: Folder for `--config-dir` of the trainer, within the workdir.
        time: Unix seconds of the plan, from which a deadline counts; None: the deadline counts from
            the first start.
    """

    name: str
    candidates: tuple[Candidate, ...]
    storage: Storage
    overrides: tuple[str, ...]
    launch: LaunchConfig
    total_tokens: int
    config_dir: Path | None = None
    time: float | None = None

    @property
    def num_nodes(self) -> int:
        """Number of nodes, which is the same for every candidate."""
        return self.candidates[0].num_nodes

    @property
    def secrets(self) -> tuple[str, ...]:
        """Names of variables with secrets: the user's, and the token by which nodes join."""
        token = [TOKEN_VARIABLE] if self.num_nodes > 1 else []
        return tuple(dict.fromkeys([*self.launch.secrets, *token]))

    def heading(self, usage: str) -> str:
        """Returns comment lines for a rendered file: candidates, what a loss costs, and usage."""
        lines = [
            f"# {c.num_nodes} x {c.offer.gpus_per_node} {c.offer.gpu}, {c.offer.place}"
            f"{' spot' if c.offer.is_spot else ''}: ${c.costs.total_usd:,.2f} expected, "
            f"done in {c.p50_h:.1f} to {c.p95_h:.1f} h"
            for c in self.candidates
        ]
        if self.num_nodes > 1:
            lines.append(f"# {self.storage.on_loss}")
        return "\n".join([*lines, f"#   {usage}"])

    def supervise(self, price: Sequence[str], port: str = str(SUPERVISOR_PORT)) -> str:
        """Returns the command of the first node, which pays for all nodes and supervises them.

        Args:
            price: See `guard`.
            port: Port at which the other nodes join, as the shell reads it: `29400`, `"$port"`.
        """
        listen = f" --listen {port} --nodes {self.num_nodes}" if self.num_nodes > 1 else ""
        return self.guard(f"python -m launch supervise{listen} -- {self._train()}", price)

    def join(self, address: str, options: str = "") -> str:
        """Returns the command of every other node.

        Args:
            address: Host and port of the first node, as the shell reads them.
            options: More options of `launch join`, each with a space in front.
        """
        # The trainer's command must be the supervisor's, word for word.
        return f"python -m launch join {address}{options} -- {self._train()}"

    def pipeline(self, option: str, stage: Stage) -> str:
        """Returns `launch pipeline` for one stage, to be run where the run directory is.

        Args:
            option: `--only` or `--record`.
            stage: Stage to run or to record.
        """
        stages = ",".join(stage.value for stage in self.launch.stages)
        words = [option, stage.value, *self._words(), f"launch.stages=[{stages}]"]
        return shlex.join(["python", "-m", "launch", "pipeline", *words])

    def guard(self, command: str, price: Sequence[str]) -> str:
        """Returns a command under the guard, which pays for it and stops it at the budget.

        Args:
            command: Command to guard.
            price: Options of the guard that give the price of a node.
        """
        best, launch = self.candidates[0], self.launch
        run_dir, kept_at = self.storage.run_dir, self.storage.kept_at
        estimate = {
            "usd": round(best.costs.total_usd, 2),
            "p50_h": round(best.p50_h, 2),
            "p95_h": round(best.p95_h, 2),
            "tokens": self.total_tokens,
        }
        if self.time is not None:
            estimate["time"] = self.time
        words = ["python", "-m", "launch", "guard", *price]
        words += ["--ledger", f"{kept_at or run_dir}/ledger"]
        words += ["--run-dir", str(run_dir), "--estimate", json.dumps(estimate)]
        if launch.budget_usd is not None:
            words += ["--budget-usd", f"{launch.budget_usd:g}"]
        if launch.deadline is not None:
            words += ["--deadline-h", f"{launch.deadline_h:g}"]
        return f"{shlex.join(words)} -- {command}"

    def own_price(self) -> list[str]:
        """Returns the price options of the guard, for machines that do not know their place."""
        offer = self.candidates[0].offer
        return ["--usd-per-h", f"{offer.usd_per_h:g}", "--nodes", str(self.num_nodes)]

    def _train(self) -> str:
        """Returns the command that each rank runs."""
        return shlex.join(["python", "-m", "trainer", *self._words()])

    def _words(self) -> list[str]:
        # The place decides the run directory; an upload that the user has set is kept.
        words = [w for w in self.overrides if not w.lstrip("+").startswith("run.dir=")]
        kept_at = self.storage.kept_at
        if kept_at is not None and not any("checkpoint.upload=" in w for w in words):
            words.append(f"checkpoint.upload=file://{kept_at}/checkpoints")
        folder = [] if self.config_dir is None else [f"--config-dir={self.config_dir}"]
        return [*folder, *words, f"run.dir={self.storage.run_dir}"]


class Place(Protocol):
    """A system that runs jobs on other machines."""

    def usable(self, plan: Plan) -> list[Candidate]:
        """Returns the candidates of a plan that this place offers, best first; at least one.

        Raises:
            ConfigError: The place offers none of the candidates.
        """

    def storage(self, name: str, settings: Settings, candidates: Sequence[Candidate]) -> Storage:
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
    same_size = [c for c in usable if c.num_nodes == usable[0].num_nodes][: launch.candidates]
    return Job(
        name=name,
        candidates=tuple(same_size),
        storage=place.storage(name, plan.settings, same_size),
        overrides=plan.settings.overrides,
        launch=launch,
        total_tokens=plan.workload.total_tokens,
        config_dir=config_dir,
        time=time,
    )


def secrets_of(job: Job) -> dict[str, str]:
    """Returns the values of a job's secrets from this environment, and a new token if it has none.

    Raises:
        ConfigError: A secret of the user's has no value.
    """
    values = {name: os.environ.get(name, "") for name in job.secrets}
    if TOKEN_VARIABLE in values and not values[TOKEN_VARIABLE]:
        values[TOKEN_VARIABLE] = new_token()
    for name, value in values.items():
        if not value:
            rule = "is not set in this environment"
            raise ConfigError("launch.secrets", name, rule, f"export {name}=...")
    return values


def of_one_pool(plan: Plan) -> list[Candidate]:
    """Returns the candidates on the best pool, best first: a job does not span two pools."""
    best = plan.candidates[0].offer.pool
    return [candidate for candidate in plan.candidates if candidate.offer.pool == best]


def refuse_unused(launch: LaunchConfig, *names: str) -> None:
    """Raises ConfigError if one of these settings is given, since the target does not use them."""
    for name in names:
        if getattr(launch, name) is not None:
            rule = f"has no effect with launch.target={launch.target.value}"
            fix = "leave it out"
            if name == "bucket":
                fix += "; checkpoint.upload=URL copies checkpoints to a store"
            raise ConfigError(f"launch.{name}", getattr(launch, name), rule, fix)
