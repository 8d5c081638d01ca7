"""Reads a run directory for the report. Only `metrics.jsonl` is mandatory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from yaml import YAMLError

from core import layout
from core.errors import ConfigError, DamagedError
from monitoring.events import read_events
from monitoring.jsonl import NOT_FINITE, read_records


@dataclass(frozen=True)
class Checkpoint:
    """Describes a committed checkpoint.

    Attributes:
        name: Name of its folder.
        size_bytes: Total size of its files.
        latest: True if `LATEST` names it.
    """

    name: str
    size_bytes: int
    latest: bool


@dataclass(frozen=True)
class Run:
    """Holds everything that is known about a run.

    Attributes:
        folder: Run directory.
        records: Records of `metrics.jsonl`, in order.
        samples: Samples of `samples.jsonl`, in order.
        events: Events of `events.jsonl`, in order; empty if the file is missing.
        supervisor_events: Events of `supervisor.jsonl`, likewise.
        status: Content of `status.json`; empty if missing, like the next three.
        config: Resolved configuration of `config.yaml`.
        environment: Result of `describe_environment`, from `environment.json`.
        data: Digests and sources of the data, from `data.json`.
        checkpoints: Checkpoints in order of their steps.
    """

    folder: Path
    records: list[dict[str, object]]
    samples: list[dict[str, object]]
    events: list[dict[str, object]]
    supervisor_events: list[dict[str, object]]
    status: dict[str, object]
    config: dict[str, object]
    environment: dict[str, object]
    data: dict[str, object]
    checkpoints: list[Checkpoint]

    @property
    def name(self) -> str:
        """Name of the run, or of its folder if the status gives none."""
        return str(self.status.get("run_name") or self.folder.name)

    @property
    def resumes(self) -> list[int]:
        """Steps of the first records after a resume."""
        return [cast(int, r["step"]) for r in self.records if r.get("resumed") is True]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Returns the steps at which a key was logged, and its values there, finite or not.

        Args:
            key: Key of a record.
        """
        points = [
            (cast(int, r["step"]), v) for r in self.records if (v := number(r.get(key))) is not None
        ]
        return [step for step, _ in points], [value for _, value in points]


def number(value: object) -> float | None:
    """Returns a logged number, including "NaN" and the infinities; None for anything else.

    Args:
        value: Value as JSON gave it.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    return float(value) if isinstance(value, str) and value in NOT_FINITE else None


def mapping(value: object) -> dict[str, object]:
    """Returns the value if it is a mapping, else an empty one.

    Args:
        value: Value as JSON gave it.
    """
    return value if isinstance(value, dict) else {}


def mappings(value: object) -> list[dict[str, object]]:
    """Returns the mappings in a list; an empty list for any other value.

    Args:
        value: Value as JSON gave it.
    """
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def read_run(run_dir: Path) -> Run:
    """Reads a run directory.

    Args:
        run_dir: Run directory with `metrics.jsonl`, which may be empty.

    Raises:
        ConfigError: The directory has no `metrics.jsonl`.
        DamagedError: A JSON or YAML file cannot be parsed.
    """
    if not (run_dir / layout.METRICS).is_file():
        raise ConfigError(
            "run_dir", run_dir, "has no metrics.jsonl", "name the folder of a run, e.g. runs/demo"
        )
    return Run(
        folder=run_dir,
        records=read_records(run_dir / layout.METRICS),
        samples=read_records(run_dir / layout.SAMPLES),
        events=read_events(run_dir),
        supervisor_events=read_records(run_dir / layout.SUPERVISOR_EVENTS, has_steps=False),
        status=_read_json(run_dir / layout.STATUS),
        config=_read_yaml(run_dir / layout.CONFIG),
        environment=_read_json(run_dir / layout.ENVIRONMENT),
        data=_read_json(run_dir / layout.DATA),
        checkpoints=_checkpoints(run_dir / layout.CHECKPOINTS),
    )


def _read_json(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        return mapping(json.loads(path.read_bytes()))
    except ValueError as error:
        raise DamagedError(
            "file", path, f"is not JSON ({error})", "restore or delete it"
        ) from error


def _read_yaml(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        return mapping(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
    except YAMLError as error:
        raise _damaged(path, "YAML") from error


def _damaged(path: Path, form: str) -> DamagedError:
    return DamagedError("file", path, f"is not {form}", "restore it or delete it")


def _checkpoints(folder: Path) -> list[Checkpoint]:
    names = sorted(p.name for p in folder.glob(f"{layout.STEP}*") if p.is_dir())
    latest = _latest(folder)
    return [Checkpoint(name, _size_bytes(folder / name), name == latest) for name in names]


def _latest(folder: Path) -> str:
    """Returns the name of the newest checkpoint; `LATEST` links to it or contains its name."""
    for pointer in (folder / layout.LATEST, folder.parent / layout.LATEST):
        if pointer.is_symlink():
            return pointer.readlink().name
        if pointer.is_file():
            return Path(pointer.read_text(encoding="utf-8").strip()).name
    return ""


def _size_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
