"""The folders that a compression leaves, and what is said of where they come from."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compression.config import CompressionConfig
from compression.source import Source
from core.errors import ConfigError
from core.folder import LINEAGE, LockHeldError, find_run, locked, sha256_of
from monitoring.environment import describe_environment

REPORT = "compression.json"
WORK = ".work"
CANDIDATES = ".candidates"  # of recipe=auto
AUTO = "auto.json"
REJECTED = "rejected.json"  # the report of what did not pass the gate
_LOCK = ".lock"
_WEIGHTS = ("*.safetensors", "*.gguf", "openvino_model.bin")


def find_trained(name: str) -> Path:
    """Finds a run directory, by its path or by its name under `runs/`.

    Raises:
        ConfigError: There is none.
    """
    run = find_run(name, holds="config.yaml")
    if run is None:
        raise ConfigError("run", name, "is no run directory", "give runs/<name>")
    return run


def places(config: CompressionConfig) -> tuple[Path, Path]:
    """Folder of the parent, and folder for what is made of it.

    Raises:
        ConfigError: There is no such run or folder, or it was not exported.
    """
    recipe = Path("compressed") / config.recipe_name
    if config.parent.run is not None:
        run = find_trained(config.parent.run)
        parent, out = run / "export", run / recipe
        if not parent.is_dir():
            fix = f"run python -m trainer.export run={run}"
            raise ConfigError("run", config.parent.run, "has no export", fix)
    else:
        parent, out = Path(config.parent.model or "").expanduser(), recipe
        if not config.parent.model or not parent.is_dir():
            fix = "give a Hugging Face folder on this machine"
            raise ConfigError("model", config.parent.model, "there is no such folder", fix)
    if config.out is not None:
        out = Path(config.out).expanduser()
    return parent.absolute(), out.absolute()


def check_replaceable(out: Path, recipe: str | None, parent: Path) -> None:
    """Raises ConfigError where `out` holds what this recipe has not made of this model.

    Args:
        out: Folder for artifacts.
        recipe: Name of the recipe; None: any.
        parent: Folder of the model.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError("out", out, "is a file", "name a folder")
    for path in out.iterdir():
        if path.name in (WORK, CANDIDATES, AUTO, REJECTED, _LOCK):
            continue
        if not (path / REPORT).is_file():
            rule = f"holds {path.name}, which is of no compression"
            raise ConfigError("out", out, rule, "choose an empty folder")
        found = read_report(path)["recipe"]
        if recipe is not None and found != recipe:
            raise ConfigError("out", out, f"holds what {found} left", "choose another folder")
        made_of = json.loads((path / LINEAGE).read_text(encoding="utf-8"))["parent"]
        if made_of["path"] != str(parent) and not _holds(parent, made_of["files"]):
            rule = f"holds what was made of {made_of['path']}"
            raise ConfigError("out", out, rule, "name another folder with out=")


def _holds(folder: Path, digests: dict[str, str]) -> bool:
    """Whether a folder is the one that had files of these digests, perhaps moved."""
    return all(
        (folder / name).is_file() and sha256_of(folder / name) == digest
        for name, digest in digests.items()
    )


def claim(work: Path, made_from: dict[str, Any]) -> None:
    """Makes a work folder; empties it of what another parent, recipe or calibration left."""
    path, text = work / "made_from.json", json.dumps(made_from, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        path.write_text(text)
    except OSError as e:
        raise _unwritable(work.parent, e) from e


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Makes a folder, and holds it: two commands would take each other's work away.

    Raises:
        ConfigError: Another process works in it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _unwritable(out, e) from e
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(out / _LOCK, timeout_s=0))
        except LockHeldError as e:
            rule, fix = "another command works in it", "wait for that one, or choose another folder"
            raise ConfigError("out", out, rule, fix) from e
        except OSError as e:
            raise _unwritable(out, e) from e
        try:
            yield
        finally:  # while it is held: who waits for the file that is gone opens the next one
            (out / _LOCK).unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> ConfigError:
    fix = "choose a folder that can be written"
    return ConfigError("out", out, error.strerror or str(error), fix)


def weight_bytes(folder: Path) -> int:
    """Of all files of weights in a folder."""
    files = (path for pattern in _WEIGHTS for path in folder.glob(pattern))
    return sum(path.stat().st_size for path in files)


def origin(source: Source, made_from: dict[str, Any]) -> dict[str, Any]:
    """Returns where an artifact comes from, for its `lineage.json`.

    Args:
        source: The parent.
        made_from: Recipe and calibration.
    """
    return {
        "code": describe_environment().get("git"),
        "tokenizer_fingerprint": source.tokenizer_fingerprint,
        "parent": {"path": str(source.folder), "files": source.digests, "lineage": source.lineage},
        "compression": made_from,
    }


def read_report(artifact: Path) -> dict[str, Any]:
    """An artifact's `compression.json`."""
    report: dict[str, Any] = json.loads((artifact / REPORT).read_text(encoding="utf-8"))
    return report
