"""A run directory as the report reads it. Only `metrics.jsonl` must be there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from yaml import YAMLError

from core.errors import ConfigError, DamagedError
from monitoring.events import read_events
from monitoring.jsonl import NOT_FINITE, read_records


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        name: Of its folder.
        size_bytes: Of all its files.
        latest: The one that `LATEST` names.
    """

    name: str
    size_bytes: int
    latest: bool


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        folder: The run directory.
        records: Of `metrics.jsonl`, in order.
        samples: Of `samples.jsonl`, in order.
        events: Of `events.jsonl`, in order; empty when absent.
        status: `status.json`; empty when absent, as the three below.
        config: The resolved configuration.
        environment: What `describe_environment` returned.
        data: Digests and sources.
        checkpoints: In order of their steps.
    """

    folder: Path
    records: list[dict[str, object]]
    samples: list[dict[str, object]]
    events: list[dict[str, object]]
    status: dict[str, object]
    config: dict[str, object]
    environment: dict[str, object]
    data: dict[str, object]
    checkpoints: list[Checkpoint]

    @property
    def name(self) -> str:
        """The run's name, or its folder's."""
        return str(self.status.get("run_name") or self.folder.name)

    @property
    def resumes(self) -> list[int]:
        """Steps of the first records after a resume."""
        return [cast(int, r["step"]) for r in self.records if r.get("resumed") is True]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which a key was logged, and its values there; some may not be finite.

        Args:
            key: Of a record.
        """
        points = [
            (cast(int, r["step"]), v) for r in self.records if (v := number(r.get(key))) is not None
        ]
        return [step for step, _ in points], [value for _, value in points]


def number(value: object) -> float | None:
    """A logged number, "NaN" and the infinities among them; None for anything else.

    Args:
        value: As JSON gave it.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    return float(value) if isinstance(value, str) and value in NOT_FINITE else None


def mapping(value: object) -> dict[str, object]:
    """The value if it is a mapping, else an empty one.

    Args:
        value: As JSON gave it.
    """
    return value if isinstance(value, dict) else {}


def mappings(value: object) -> list[dict[str, object]]:
    """The mappings in a list; empty for anything else.

    Args:
        value: As JSON gave it.
    """
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def read_run(run_dir: Path) -> Run:
    """Read a run directory.

    Args:
        run_dir: With at least `metrics.jsonl`, which may be empty.

    Raises:
        ConfigError: It has no `metrics.jsonl`.
        DamagedError: One of its JSON or YAML files cannot be parsed.
    """
    if not (run_dir / "metrics.jsonl").is_file():
        raise ConfigError(
            "run_dir", run_dir, "has no metrics.jsonl", "name the folder of a run, e.g. runs/demo"
        )
    return Run(
        folder=run_dir,
        records=read_records(run_dir / "metrics.jsonl"),
        samples=read_records(run_dir / "samples.jsonl"),
        events=read_events(run_dir),
        status=_read_json(run_dir / "status.json"),
        config=_read_yaml(run_dir / "config.yaml"),
        environment=_read_json(run_dir / "environment.json"),
        data=_read_json(run_dir / "data.json"),
        checkpoints=_checkpoints(run_dir / "checkpoints"),
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
    names = sorted(p.name for p in folder.glob("step-*") if p.is_dir())
    latest = _latest(folder)
    return [Checkpoint(name, _size_bytes(folder / name), name == latest) for name in names]


def _latest(folder: Path) -> str:
    """Name of the newest checkpoint, whether `LATEST` is a link to it or a file that holds it."""
    for pointer in (folder / "LATEST", folder.parent / "LATEST"):
        if pointer.is_symlink():
            return pointer.readlink().name
        if pointer.is_file():
            return Path(pointer.read_text(encoding="utf-8").strip()).name
    return ""


def _size_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
