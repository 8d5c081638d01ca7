"""A job as it is handed to whoever runs it: its command, and the places where it may run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.config import LaunchConfig, Stage
from launch.plan.candidate import Candidate

PORT = 29400
MOUNT = "/spotforge"


@dataclass(frozen=True)
class Job:
    """What is placed.

    Attributes:
        name: Lower-case letters, digits and dashes.
        candidates: Where it may run, best first, each of the same number of nodes.
        run_dir: Of the trainer, as the machines see it.
        kept_at: A folder to which checkpoints and the ledger are copied, and which outlives the
            machines; None: `run_dir` does.
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
    kept_at: str | None
    overrides: tuple[str, ...]
    launch: LaunchConfig
    total_tokens: int
    config_dir: Path | None = None
    time: float | None = None

    @property
    def num_nodes(self) -> int:
        """Of every candidate."""
        return self.candidates[0].num_nodes

    def trainer_command(self) -> list[str]:
        """What each rank runs."""
        return ["python", "-m", "trainer", *self._words()]

    def pipeline_command(self, option: str, stage: Stage) -> list[str]:
        """`pipeline --only STAGE` or `--record STAGE`, on a machine that has the run directory."""
        stages = ",".join(stage.value for stage in self.launch.stages)
        words = [*self._words(), f"launch.stages=[{stages}]"]
        return ["python", "-m", "launch", "pipeline", option, stage.value, *words]

    def _words(self) -> list[str]:
        words = [w for w in self.overrides if not w.lstrip("+").startswith("run.dir=")]
        if self.kept_at is not None and not any("checkpoint.upload=" in w for w in words):
            words.append(f"checkpoint.upload=file://{self.kept_at}/checkpoints")
        folder = [] if self.config_dir is None else [f"--config-dir={self.config_dir}"]
        return [*folder, *words, f"run.dir={self.run_dir}"]

    def guard_command(self, command: Sequence[str], price: Sequence[str]) -> list[str]:
        """The command under the guard that pays for it and stops it at the budget.

        Args:
            command: To be guarded.
            price: The guard's options that say what a node costs.
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
        """The guard's options, on machines that do not say where they are."""
        offer = self.candidates[0].offer
        return ["--usd-per-h", f"{offer.usd_per_h:g}", "--nodes", str(self.num_nodes)]


def heading(job: Job, usage: str) -> str:
    """Comment lines: where the job may run, and how the file is used."""
    lines = [
        f"# {way.num_nodes} x {way.offer.gpus_per_node} {way.offer.gpu}, {way.offer.place}"
        f"{' spot' if way.offer.is_spot else ''}: ${way.costs.total_usd:,.2f} expected, "
        f"done in {way.p50_h:.1f} to {way.p95_h:.1f} h"
        for way in job.candidates
    ]
    return "\n".join([*lines, f"#   {usage}"])


def to_yaml(*documents: Any) -> str:
    """Documents as a person reads them: keys in their order, scripts line by line."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Writes scripts line by line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> Any:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
