"""A job for a place: its commands, and the candidates where it may run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.config import LaunchConfig, Stage
from launch.plan.candidate import Candidate

MOUNT = "/spotforge"


@dataclass(frozen=True)
class Job:
    """A job that is ready to be placed.

    Attributes:
        name: Name of lower-case letters, digits and dashes.
        candidates: Offers where the job may run, best first, all with the same number of nodes.
        run_dir: Run directory of the trainer, as the machines see it.
        kept_at: Folder for copies of checkpoints and the ledger, which outlives the machines; None:
            `run_dir` outlives them.
        overrides: Overrides of the trainer.
        launch: Settings of the launcher.
        total_tokens: Number of tokens to train on.
        config_dir: Folder for `--config-dir` of the trainer, within the workdir.
        time: Unix seconds of the plan, from which a deadline counts; None: the deadline counts from
            the first start.
    """

    name: str
    candidates: tuple[Candidate, ...]
    run_dir: Path
    kept_at: str | None
    overrides: tuple[str, ...]
    launch: LaunchConfig
    total_tokens: int
    config_dir: Path | None = None
    time: float | None = None

    @property
    def num_nodes(self) -> int:
        """Number of nodes, which is the same for every candidate."""
        return self.candidates[0].num_nodes

    def trainer_command(self) -> list[str]:
        """Returns the command that each rank runs."""
        return ["python", "-m", "trainer", *self._words()]

    def pipeline_command(self, option: str, stage: Stage) -> list[str]:
        """Returns `launch pipeline` for one stage, to be run where the run directory is.

        Args:
            option: `--only` or `--record`.
            stage: Stage to run or to record.
        """
        stages = ",".join(stage.value for stage in self.launch.stages)
        words = [*self._words(), f"launch.stages=[{stages}]"]
        return ["python", "-m", "launch", "pipeline", option, stage.value, *words]

    def _words(self) -> list[str]:
        # The place decides the run directory; an upload that the user has set is kept.
        words = [w for w in self.overrides if not w.lstrip("+").startswith("run.dir=")]
        if self.kept_at is not None and not any("checkpoint.upload=" in w for w in words):
            words.append(f"checkpoint.upload=file://{self.kept_at}/checkpoints")
        folder = [] if self.config_dir is None else [f"--config-dir={self.config_dir}"]
        return [*folder, *words, f"run.dir={self.run_dir}"]

    def guard_command(self, command: Sequence[str], price: Sequence[str]) -> list[str]:
        """Returns a command under the guard, which pays for it and stops it at the budget.

        Args:
            command: Command to guard.
            price: Options of the guard that give the price of a node.
        """
        best, launch = self.candidates[0], self.launch
        estimate = {
            "usd": round(best.costs.total_usd, 2),
            "p50_h": round(best.p50_h, 2),
            "p95_h": round(best.p95_h, 2),
            "tokens": self.total_tokens,
        }
        if self.time is not None:
            estimate["time"] = self.time
        words = ["python", "-m", "launch", "guard", *price]
        words += ["--ledger", f"{self.kept_at or self.run_dir}/ledger"]
        words += ["--run-dir", str(self.run_dir), "--estimate", json.dumps(estimate)]
        if launch.budget_usd is not None:
            words += ["--budget-usd", f"{launch.budget_usd:g}"]
        if launch.deadline is not None:
            words += ["--deadline-h", f"{launch.deadline_h:g}"]
        return [*words, "--", *command]

    def own_price(self) -> list[str]:
        """Returns the price options of the guard, for machines that do not know their place."""
        offer = self.candidates[0].offer
        return ["--usd-per-h", f"{offer.usd_per_h:g}", "--nodes", str(self.num_nodes)]


def heading(job: Job, usage: str) -> str:
    """Returns comment lines for a rendered file: its candidates and its usage."""
    lines = [
        f"# {way.num_nodes} x {way.offer.gpus_per_node} {way.offer.gpu}, {way.offer.place}"
        f"{' spot' if way.offer.is_spot else ''}: ${way.costs.total_usd:,.2f} expected, "
        f"done in {way.p50_h:.1f} to {way.p95_h:.1f} h"
        for way in job.candidates
    ]
    return "\n".join([*lines, f"#   {usage}"])


def to_yaml(*documents: Any) -> str:
    """Returns documents as readable YAML: keys in their order, scripts line by line."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Writes texts of several lines as block scalars, and repeated values in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> Any:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
