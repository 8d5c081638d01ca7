"""Turns any checkpoint into an ordinary Hugging Face folder, without a GPU and without the model.

python -m trainer.export run=runs/demo
python -m trainer.export run=runs/demo checkpoint=step-00001000 out=exports/demo dtype=bfloat16
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file

from monitoring.environment import describe_environment
from monitoring.errors import ConfigError, SpotforgeError
from parallel.config import Dtype
from trainer.checkpoint import (
    ASSETS,
    committed,
    read_state,
    read_tensors,
    sha256_of,
    tensor_shapes,
    verify,
)

_SHARD_BYTES = 5 * 10**9  # what the hub recommends for one file


@dataclass
class ExportArguments:
    """`python -m trainer.export`.

    Attributes:
        run: Run directory, or the name of a run under `runs/`.
        checkpoint: Name of a checkpoint of the run; null takes the newest valid one.
        out: Folder to write; null means `export` in the run directory.
        dtype: Type of the weights.
    """

    run: str = MISSING
    checkpoint: str | None = None
    out: str | None = None
    dtype: Dtype = Dtype.float32


def export_checkpoint(checkpoint: Path, out: Path, dtype: Dtype) -> None:
    """Writes safetensors, config, tokenizer and `lineage.json`, and replaces `out` at once.

    Holds one shard of at most 5 GB at a time.

    Args:
        checkpoint: A committed, verified checkpoint.
        out: The Hugging Face folder.
        dtype: Type of its weights; float32 reproduces the training model's logits exactly.
    """
    _check_replaceable(out)
    staging = out.with_name(f".staging-{out.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        shutil.copytree(checkpoint / ASSETS, staging)
        _write_weights(checkpoint, staging, getattr(torch, dtype.value))
        config = json.loads((staging / "config.json").read_text()) | {"dtype": dtype.value}
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        lineage = _lineage(checkpoint, staging, dtype)
        (staging / "lineage.json").write_text(json.dumps(lineage, indent=1) + "\n")
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    except OSError as e:
        raise ConfigError(
            "export",
            out,
            e.strerror or str(e),
            "free space or change permissions, then export again",
        ) from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(out: Path) -> None:
    """Raises ConfigError unless `out` is absent, empty, or an export of ours and nothing else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError("out", out, "is a file", "name a folder")
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    known: set[str] = set()
    if "lineage.json" in files:
        known = {"lineage.json", *json.loads((out / "lineage.json").read_text())["files"]}
    strange = sorted(files - known)
    if strange:
        raise ConfigError(
            "out", out, f"holds {strange[0]}, which is of no export", "choose an empty folder"
        )


def _write_weights(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    shapes = {n: s for n, s in tensor_shapes(checkpoint).items() if not n.startswith("optim.")}
    shards = list(_shards(shapes, dtype.itemsize))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.empty(shapes[name]) for name in names}
        read_tensors(checkpoint, tensors)
        save_weights({n: t.to(dtype) for n, t in tensors.items()}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def save_weights(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes safetensors that others may read, as any other file; by itself they are 0600."""
    save_file(tensors, path, {"format": "pt", **(metadata or {})})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _shards(shapes: dict[str, torch.Size], itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + shape.numel() * itemsize > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += shape.numel() * itemsize
    yield names


def _lineage(checkpoint: Path, folder: Path, dtype: Dtype) -> dict[str, Any]:
    """Where the weights come from; the next stage refuses files that do not match it."""
    state = read_state(checkpoint)
    model = state.config["model"]
    return {
        "format_version": 1,
        "code": describe_environment().get("git"),
        "config_sha256": hashlib.sha256(
            json.dumps(state.config, sort_keys=True).encode()
        ).hexdigest(),
        "data_digest": state.data_digest,
        "tokenizer_fingerprint": state.tokenizer_fingerprint,
        "parent": {"path": model["path"], "revision": model["revision"]}
        if model.get("weights")
        else None,
        "checkpoint": {
            "name": checkpoint.name,
            "manifest_sha256": sha256_of(checkpoint / "manifest.json"),
            "step": state.step,
            "num_tokens": state.num_tokens,
        },
        "dtype": dtype.value,
        "files": {
            str(p.relative_to(folder)): {"size_bytes": p.stat().st_size, "sha256": sha256_of(p)}
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        },
    }


def _find_run(name: str) -> Path:
    for folder in (Path(name).expanduser(), Path("runs") / name):
        if (folder / "checkpoints").is_dir():
            return folder.absolute()
    raise ConfigError("run", name, "is no run directory with checkpoints", "give runs/<name>")


def _find_checkpoint(run: Path, name: str | None) -> Path:
    if name is not None:
        path = run / "checkpoints" / name
        if not path.is_dir():
            have = ", ".join(p.name for p in committed(run / "checkpoints")) or "none"
            raise ConfigError(
                "checkpoint", name, "there is no such checkpoint", f"there are: {have}"
            )
        verify(path)
        return path
    newest: ConfigError | None = None
    for path in committed(run / "checkpoints"):
        try:
            verify(path)
        except ConfigError as e:
            print(f"passed over: {e}", file=sys.stderr)
            newest = newest or e
            continue
        return path
    raise newest or ConfigError("run", run, "has no committed checkpoint", "train it first")


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        try:
            merged = OmegaConf.merge(
                OmegaConf.structured(ExportArguments), OmegaConf.from_dotlist(argv)
            )
            arguments: Any = OmegaConf.to_object(merged)
        except OmegaConfBaseException as e:
            rule = str(e).split("\n")[0]
            raise ConfigError("export", " ".join(argv), rule, "see --help") from e
        run = _find_run(arguments.run)
        checkpoint = _find_checkpoint(run, arguments.checkpoint)
        out = Path(arguments.out).expanduser().absolute() if arguments.out else run / "export"
        export_checkpoint(checkpoint, out, arguments.dtype)
    except SpotforgeError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    print(f"{checkpoint.name} -> {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
