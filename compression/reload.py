"""Loads an artifact as a user would, in a fresh process, and compares it with its parent.

    python -m compression.reload JOB.json

Shapes: N samples of T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compression.config import Target
from compression.evaluate import compare, logits_of
from compression.hidden import Hidden
from compression.stream import BlockStream
from core.errors import Interrupted, SpotforgeError
from core.process.child import Finished, run
from core.process.python import environment, python

_TIMEOUT_S = 4 * 3600


class ReloadError(SpotforgeError):
    """A packed artifact does not load, or does not compute what it was made to."""


@dataclass(frozen=True)
class Beside:
    """A model that artifacts are compared with.

    Attributes:
        folder: Folder of the model.
        hidden: Output of the model's last block for the samples.
        wraps: True if its blocks return tuples, see `BlockStream`.
    """

    folder: Path
    hidden: Hidden
    wraps: bool


@dataclass(frozen=True)
class Reloaded:
    """Facts about an artifact after it was loaded.

    Attributes:
        dtype: Type in which it computes, by torch's name; None if its engine decides.
        quality: Comparison with the parent, as `Quality.describe` writes it.
        logits: Logits of the first samples (N, T, V) float32.
    """

    dtype: str | None
    quality: dict[str, Any]
    logits: Tensor


def reload(
    target: Target,
    artifact: Path,
    input_ids: Tensor,
    num_logits: int,
    parent: Beside,
    folder: Path,
    stop_requested: Callable[[], bool],
) -> Reloaded:
    """Has a fresh process load an artifact and compare it with its parent.

    Args:
        target: Target whose `load` is called.
        artifact: Folder that the target packed.
        input_ids: Token ids (N, T) int64.
        num_logits: Number of samples whose logits are returned.
        parent: Model to compare the artifact with.
        folder: Folder for files that the two processes exchange.
        stop_requested: Function that is polled while the process runs.

    Raises:
        ReloadError: The artifact does not load, or takes too long.
        Interrupted: A stop was requested.
    """
    # A fresh process shows that the files alone are enough: this one has modules and classes loaded
    # that a user's may lack.
    with tempfile.TemporaryDirectory(dir=folder) as name:
        exchange = Path(name)
        np.save(exchange / "tokens.npy", input_ids.numpy())
        job = {
            "target": target.value,
            "artifact": str(artifact),
            "parent": str(parent.folder),
            "wraps": parent.wraps,
            "hidden": str(parent.hidden.path),
            "shape": parent.hidden.shape,
            "num_logits": num_logits,
        }
        (exchange / "job.json").write_text(json.dumps(job))
        done = _run(artifact, str(exchange / "job.json"), stop_requested)
        if done.code != 0:
            raise ReloadError(f"{artifact}: does not load in a fresh process: {done.last_line}")
        told = json.loads((exchange / "told.json").read_text())
        logits = torch.from_numpy(np.load(exchange / "logits.npy"))
    return Reloaded(told["dtype"], told["quality"], logits)


def signal_to_noise_db(wanted: Tensor, found: Tensor) -> float:
    """Returns how much larger a signal is than its difference from another, in dB (any shape)."""
    # Clamped, as equal tensors leave no noise at all.
    noise = (found - wanted).double().square().mean().clamp_min(1e-30)
    return float(10 * (wanted.double().square().mean() / noise).log10())


def _run(artifact: Path, job: str, stop_requested: Callable[[], bool]) -> Finished:
    """Runs the fresh process to its end."""

    def stop_if_told() -> None:
        if stop_requested():
            rule = "stopped while an artifact was loaded again; the same command goes on"
            raise Interrupted(rule)

    try:
        return run(python("-m", __name__, job), environment(), _TIMEOUT_S, stop_if_told)
    except TimeoutError:
        rule = f"took over {_TIMEOUT_S / 3600:.0f} hours to load in a fresh process"
        raise ReloadError(f"{artifact}: {rule}") from None


@torch.no_grad()
def main(path: Path) -> None:
    """Compares the artifact that a job file names with its parent, in the fresh process.

    Writes `told.json` and `logits.npy` beside the job file.

    Args:
        path: Job file, written by `reload`.
    """
    job = json.loads(path.read_text())
    input_ids = torch.from_numpy(np.load(path.with_name("tokens.npy")))
    artifact = Path(job["artifact"])
    model = importlib.import_module(f"compression.targets.{job['target']}").load(artifact)
    kept: list[Tensor] = []

    def found() -> Iterator[Tensor]:
        for row in input_ids:
            logits = model(row.unsqueeze(0), use_cache=False).logits.float()
            if len(kept) < job["num_logits"]:
                kept.append(logits)
            yield logits

    parent = BlockStream(Path(job["parent"]))
    parent.load_head()
    # Only the head of this stream runs, so that it cannot see what its blocks return.
    parent.wraps = job["wraps"]
    hidden = Hidden(Path(job["hidden"]), tuple(job["shape"]))
    quality = compare(logits_of(parent, hidden), found(), input_ids)
    dtype = getattr(model, "dtype", None)
    told = {
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "quality": quality.describe(),
    }
    path.with_name("told.json").write_text(json.dumps(told))
    np.save(path.with_name("logits.npy"), torch.cat(kept).numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
