"""The folders that a compression writes, and the record of where they come from."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compression.config import CompressionConfig
from compression.source import Source
from core import layout
from core.errors import ConfigError
from core.folder import LockHeldError, find_run, locked, sha256_of
from monitoring.environment import describe_environment

WORK = ".work"
CANDIDATES = ".candidates"  # folder in which recipe=auto makes the artifacts that it compares
AUTO = "auto.json"
REJECTED = "rejected.json"  # the report of a result that did not pass the gate
LOCK = ".lock"
_WEIGHTS = ("*.safetensors", "*.gguf", "openvino_model.bin")


def find_trained(name: str) -> Path:
    """Returns a run directory, given by its path or by its name under `runs/`.

    Raises:
        ConfigError: There is no such run directory.
    """
    run = find_run(name, holds=layout.CONFIG)
    if run is None:
        raise ConfigError("run", name, "is not a run directory", "give runs/<name>")
    return run


def places(config: CompressionConfig) -> tuple[Path, Path]:
    """Returns the folder of the parent and the folder for its artifacts.

    Raises:
        ConfigError: There is no such run or folder, or the run was not exported.
    """
    recipe = Path(layout.COMPRESSED) / config.recipe_name
    if config.parent.run is not None:
        run = find_trained(config.parent.run)
        parent, out = run / layout.EXPORT, run / recipe
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
    """Raises ConfigError if `out` holds anything but artifacts of this recipe and this model.

    Args:
        out: Folder of the artifacts.
        recipe: Name of the recipe; None accepts artifacts of any recipe.
        parent: Folder of the model.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError("out", out, "is a file", "name a folder")
    for path in out.iterdir():
        if path.name in (WORK, CANDIDATES, AUTO, REJECTED, LOCK):
            continue
        if not (path / layout.COMPRESSION).is_file():
            rule = f"contains {path.name}, which is not an artifact of a compression"
            raise ConfigError("out", out, rule, "choose an empty folder")
        found = read_report(path)["recipe"]
        if recipe is not None and found != recipe:
            raise ConfigError(
                "out", out, f"contains artifacts of recipe={found}", "choose another folder"
            )
        made_of = json.loads((path / layout.LINEAGE).read_text(encoding="utf-8"))["parent"]
        # A parent that was moved is still the same parent if its files have the same digests.
        if made_of["path"] != str(parent) and not _holds(parent, made_of["files"]):
            rule = f"contains artifacts of another model, {made_of['path']}"
            raise ConfigError("out", out, rule, "name another folder with out=")


def _holds(folder: Path, digests: dict[str, str]) -> bool:
    """Returns whether a folder holds files of these digests, wherever it lies."""
    return all(
        (folder / name).is_file() and sha256_of(folder / name) == digest
        for name, digest in digests.items()
    )


def claim(work: Path, made_from: dict[str, Any]) -> None:
    """Makes a work folder, and empties it if it is of another parent, recipe or calibration.

    Args:
        work: Folder in which a stopped command finds what it has done.
        made_from: Everything that decides the result, of JSON types.

    Raises:
        ConfigError: The folder cannot be written.
    """
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
    """Makes a folder and locks it, since two commands would delete each other's work.

    Raises:
        ConfigError: Another process holds the lock, or the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _unwritable(out, e) from e
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(out / LOCK, timeout_s=0))
        except LockHeldError as e:
            rule, fix = "another command works in it", "wait for that one, or choose another folder"
            raise ConfigError("out", out, rule, fix) from e
        except OSError as e:
            raise _unwritable(out, e) from e
        try:
            yield
        finally:
            # Removed before it is released: who waits on the removed file opens a new one.
            (out / LOCK).unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> ConfigError:
    fix = "choose a folder that can be written"
    return ConfigError("out", out, error.strerror or str(error), fix)


def weight_bytes(folder: Path) -> int:
    """Returns the total size of all weight files in a folder."""
    files = (path for pattern in _WEIGHTS for path in folder.glob(pattern))
    return sum(path.stat().st_size for path in files)


def origin(source: Source, made_from: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of an artifact's `lineage.json`.

    Args:
        source: The parent.
        made_from: The recipe, the calibration and all else that decides the result.
    """
    return {
        "code": describe_environment().get("git"),
        "tokenizer_fingerprint": source.tokenizer_fingerprint,
        "parent": {"path": str(source.folder), "files": source.digests, "lineage": source.lineage},
        "compression": made_from,
    }


def read_report(artifact: Path) -> dict[str, Any]:
    """Returns the content of an artifact's `compression.json`."""
    report: dict[str, Any] = json.loads((artifact / layout.COMPRESSION).read_text(encoding="utf-8"))
    return report
