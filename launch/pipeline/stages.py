"""The stages that `launch.stages` names, as programs that hand a folder on."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError
from core.process.python import python
from launch.config import Stage as StageName
from launch.settings import Settings

_PACKAGES = {
    StageName.train: "trainer",
    StageName.compress: "compression",
    StageName.release: "release",
}


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline. Its program goes on where it was stopped, by itself.

    Attributes:
        name: As in `launch.stages`.
        arguments: Of this Python: `-m trainer ...`.
        input: What it reads: the output of the stage before, or what an earlier pipeline left;
            None: nothing of this run.
        output: The folder, or file, that it leaves; None: nothing is handed on.
    """

    name: str
    arguments: tuple[str, ...]
    input: Path | None
    output: Path | None

    @property
    def command(self) -> list[str]:
        """The command that starts it."""
        return python(*self.arguments)


def check_stages(settings: Settings) -> None:
    """Refuses stages that cannot be run anywhere.

    Args:
        settings: Of the job.

    Raises:
        ConfigError: They are out of order, not in this version, or the first hands nothing on.
    """
    names = settings.launch.stages
    shown = _shown(names)
    in_order = [name for name in StageName if name in names]
    if names != in_order:
        rule = "is not the order in which they run"
        raise ConfigError("launch.stages", shown, rule, f"use {_shown(in_order)}")
    for name in names:
        if not _is_there(_PACKAGES[name]):
            rule = f"this version has no python -m {_PACKAGES[name]}"
            raise ConfigError("launch.stages", shown, rule, f"leave out {name.value}")
    if StageName.train in names and len(names) > 1 and not settings.trainer.export.at_end:
        rule = f"{names[1].value} reads the export"
        raise ConfigError("export.at_end", False, rule, "set it to true")


def stages_of(settings: Settings, config_dir: Path | None = None) -> list[Stage]:
    """The stages in order.

    Args:
        settings: Of the job.
        config_dir: As `--config-dir` of the trainer.

    Raises:
        ConfigError: One cannot be run: out of order, not in this version, or without its input.
    """
    check_stages(settings)
    names, trainer = settings.launch.stages, settings.trainer
    run_dir = trainer.run_dir
    words: Sequence[str] = settings.overrides
    if config_dir is not None:
        words = [f"--config-dir={config_dir}", *words]
    outputs = {
        StageName.train: run_dir / "export" if trainer.export.at_end else None,
        StageName.compress: run_dir / "compressed",
        StageName.release: run_dir / "gate.json",
    }
    stages: list[Stage] = []
    for name in names:
        of_train = name is StageName.train
        stages.append(
            Stage(
                name=name.value,
                arguments=("-m", _PACKAGES[name], *(words if of_train else [f"run={run_dir}"])),
                input=None if of_train else stages[-1].output if stages else run_dir / "export",
                output=outputs[name],
            )
        )
    first = stages[0].input
    if first is not None and not first.exists():
        rule = f"{first} is not there"
        raise ConfigError("launch.stages", _shown(names), rule, "train first: [train,...]")
    return stages


def _shown(names: Sequence[StageName]) -> str:
    return f"[{','.join(name.value for name in names)}]"


def _is_there(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a mere folder has a spec, too
