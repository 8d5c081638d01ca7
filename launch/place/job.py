"""A job as it is handed to whoever runs it: its command, and the places where it may run."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config import LaunchConfig, Stage
from launch.plan.candidate import Candidate
from launch.plan.planner import Plan
from monitoring.errors import ConfigError

PORT = 29400
MOUNT = "/spotforge"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class Job:
    """What is placed.

    Attributes:
        name: Lower-case letters, digits and dashes.
        candidates: Where it may run, best first, each of the same number of nodes.
        run_dir: Of the trainer, as the machines see it.
        overrides: Of the trainer.
        launch: Its settings.
        total_tokens: To be trained on.
        config_dir: Of the trainer, within the workdir.
        time: When it was planned, in Unix seconds, from which a deadline counts; None: from its
            first start.
    """

    name: str
    candidates: tuple[Candidate, ...]
    run_dir: Path
    overrides: tuple[str, ...]
    launch: LaunchConfig
    total_tokens: int
    config_dir: Path | None = None
    time: float | None = None

    @property
    def num_nodes(self) -> int:
        """Of every candidate."""
        return self.candidates[0].num_nodes

    @property
    def kept_at(self) -> str | None:
        """The folder of the bucket in which this job's checkpoints and ledger are."""
        return None if self.launch.bucket is None else f"{MOUNT}/{self.name}"

    def trainer_command(self) -> list[str]:
        """What each rank runs."""
        words = [w for w in self.overrides if not w.lstrip("+").startswith("run.dir=")]
        if self.kept_at is not None and not any("checkpoint.upload=" in w for w in words):
            words.append(f"checkpoint.upload=file://{self.kept_at}/checkpoints")
        folder = [] if self.config_dir is None else [f"--config-dir={self.config_dir}"]
        return ["python", "-m", "trainer", *folder, *words, f"run.dir={self.run_dir}"]

    def guard_command(self, command: Sequence[str]) -> list[str]:
        """The command under the guard that pays for it and stops it at the budget."""
        best, launch = self.candidates[0], self.launch
        estimate = {
            "usd": round(best.costs.total_usd, 2),
            "p50_h": round(best.p50_h, 2),
            "p95_h": round(best.p95_h, 2),
            "tokens": self.total_tokens,
        }
        if self.time is not None:
            estimate["time"] = self.time
        words = ["python", "-m", "launch", "guard", "--since-boot"]
        words += ["--ledger", f"{self.kept_at or self.run_dir}/ledger"]
        words += ["--run-dir", str(self.run_dir), "--estimate", json.dumps(estimate)]
        if launch.budget_usd is not None:
            words += ["--budget-usd", f"{launch.budget_usd:g}"]
        if launch.deadline is not None:
            words += ["--deadline-h", f"{launch.deadline_h:g}"]
        return [*words, "--", *command]

    def prices(self) -> str:
        """Of a node at each candidate, for the guard: JSON."""
        return json.dumps(
            [
                {
                    "cloud": way.offer.cloud,
                    "region": way.offer.region,
                    "zone": way.offer.zone,
                    "gpu": way.offer.gpu,
                    "is_spot": way.offer.is_spot,
                    "usd_per_h": way.offer.usd_per_h,
                }
                for way in self.candidates
            ]
        )


def job_of(
    plan: Plan,
    usable: Sequence[Candidate],
    config_dir: Path | None = None,
    time: float | None = None,
) -> Job:
    """The job that a plan comes to.

    Args:
        plan: Of the job.
        usable: Those of its candidates that the target can take, best first; at least one.
        config_dir: See `Job`.
        time: See `Job`.

    Raises:
        ConfigError: It cannot be placed as it is: its name, or nowhere to keep its checkpoints.
    """
    launch, trainer = plan.settings.launch, plan.settings.trainer
    if launch.stages != [Stage.train]:
        shown = f"[{','.join(stage.value for stage in launch.stages)}]"
        rule = "only training is placed elsewhere so far"
        raise ConfigError("launch.stages", shown, rule, "use [train], and `pipeline` for the rest")
    name = launch.name or re.sub(r"[^a-z0-9]+", "-", trainer.run_dir.name.lower()).strip("-")
    if not _NAME.fullmatch(name):
        rule = "is no name: up to 40 of a-z, 0-9 and -, a letter first"
        raise ConfigError("launch.name", name, rule, "set launch.name")
    num_nodes = usable[0].num_nodes
    ways = [way for way in usable if way.num_nodes == num_nodes][: launch.candidates]
    if launch.bucket is None and any(way.offer.is_spot for way in ways):
        rule = "a spot machine takes its checkpoints with it"
        fix = "set launch.bucket=s3://name (gs://, r2://), or launch.spot=never"
        raise ConfigError("launch.bucket", None, rule, fix)
    if num_nodes > 1 and launch.shared_dir is None:
        rule = f"{num_nodes} nodes write one checkpoint together, to a folder that all of them see"
        fix = "name one (NFS, FSx, Filestore), or set launch.nodes=[1]"
        raise ConfigError("launch.shared_dir", None, rule, fix)
    run_dir = Path(trainer.run.dir)
    if launch.shared_dir is not None:
        run_dir = Path(launch.shared_dir) / name
    return Job(
        name=name,
        candidates=tuple(ways),
        run_dir=run_dir,
        overrides=plan.settings.overrides,
        launch=launch,
        total_tokens=plan.workload.total_tokens,
        config_dir=config_dir,
        time=time,
    )


def shell(words: Sequence[str]) -> str:
    """A line for a shell, which quotes what has to be quoted."""
    return shlex.join(words)
