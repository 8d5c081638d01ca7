"""The stages that `launch.stages` names: programs that each hand a folder to the next."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core import layout
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
    """One stage of the pipeline. Its program resumes by itself where it was stopped.

    Attributes:
        name: Name in `launch.stages`.
        arguments: Arguments of Python, e.g. `-m trainer ...`.
        input: Path that the stage reads: the output of the stage before, or of an earlier
            pipeline; None: the stage reads nothing of this run.
        output: Folder or file that the stage writes; None: it hands nothing on.
    """

    name: str
    arguments: tuple[str, ...]
    input: Path | None
    output: Path | None

    @property
    def command(self) -> list[str]:
        """Command that starts the stage."""
        return python(*self.arguments)


def check_stages(settings: Settings) -> None:
    """Checks that the stages can be run, on whichever machine.

    Args:
        settings: Settings of the job.

    Raises:
        ConfigError: The stages are out of order, one is not in this version, or training does not
            export what the next stage reads.
    """
    names = settings.launch.stages
    shown = _shown(names)
    in_order = [name for name in StageName if name in names]
    if names != in_order:
        rule = "must be in the order in which stages run"
        raise ConfigError("launch.stages", shown, rule, f"use {_shown(in_order)}")
    for name in names:
        if not _is_there(_PACKAGES[name]):
            rule = f"this version has no python -m {_PACKAGES[name]}"
            raise ConfigError("launch.stages", shown, rule, f"leave out {name.value}")
    if StageName.train in names and len(names) > 1 and not settings.trainer.export.at_end:
        rule = f"{names[1].value} reads the export"
        raise ConfigError("export.at_end", False, rule, "set it to true")


def stages_of(settings: Settings, config_dir: Path | None = None) -> list[Stage]:
    """Returns the stages in order.

    Args:
        settings: Settings of the job.
        config_dir: Folder for `--config-dir` of the trainer.

    Raises:
        ConfigError: See `check_stages`; or the input of the first stage does not exist.
    """
    check_stages(settings)
    names, trainer = settings.launch.stages, settings.trainer
    run_dir = trainer.run_dir
    words: Sequence[str] = settings.overrides
    if config_dir is not None:
        words = [f"--config-dir={config_dir}", *words]
    outputs = {
        StageName.train: run_dir / layout.EXPORT if trainer.export.at_end else None,
        StageName.compress: run_dir / layout.COMPRESSED,
        StageName.release: run_dir / "gate.json",
    }
    stages: list[Stage] = []
    for name in names:
        of_train = name is StageName.train
        before = stages[-1].output if stages else run_dir / layout.EXPORT
        stages.append(
            Stage(
                name=name.value,
                arguments=("-m", _PACKAGES[name], *(words if of_train else [f"run={run_dir}"])),
                input=None if of_train else before,
                output=outputs[name],
            )
        )
    first = stages[0].input
    if first is not None and not first.exists():
        rule = f"{first} does not exist"
        raise ConfigError("launch.stages", _shown(names), rule, "train first: [train,...]")
    return stages


def _shown(names: Sequence[StageName]) -> str:
    return f"[{','.join(name.value for name in names)}]"


def _is_there(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder without __init__ has a spec too
