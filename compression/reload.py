"""Loads an artifact as a user would, in a process of its own, and writes its logits.

    python -m compression.reload TARGET ARTIFACT TOKENS.npy LOGITS.npy

Shapes: N samples of T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compression.config import Target
from monitoring.errors import SpotforgeError

_TIMEOUT_S = 3600


class ReloadError(SpotforgeError):
    """A packed artifact does not load, or does not compute what it was made to."""


def logits_of(target: Target, artifact: Path, input_ids: Tensor, folder: Path) -> Tensor:
    """Next-token logits of an artifact that a fresh process loads.

    Args:
        target: Whose `load` it is.
        artifact: Folder that it packed.
        input_ids: (N, T) int64.
        folder: For the two files.

    Returns:
        (N, T, V) float32.

    Raises:
        ReloadError: It does not load.
    """
    tokens, logits = folder / "tokens.npy", folder / "logits.npy"
    np.save(tokens, input_ids.numpy())
    paths = [str(path) for path in (artifact, tokens, logits)]
    command = [sys.executable, "-m", __name__, target.value, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing was said"]
        raise ReloadError(f"{artifact}: does not load in a fresh process: {said[-1]}")
    result = torch.from_numpy(np.load(logits))
    tokens.unlink()
    logits.unlink()
    return result


def signal_to_noise_db(wanted: Tensor, found: Tensor) -> float:
    """How much larger a signal is than its difference from another (any shape)."""
    noise = (found - wanted).double().square().mean().clamp_min(1e-30)
    return float(10 * (wanted.double().square().mean() / noise).log10())


def main(arguments: list[str]) -> None:
    """Entry point of the fresh process."""
    target, artifact, tokens, logits = arguments
    model = importlib.import_module(f"compression.targets.{target}").load(Path(artifact))
    with torch.no_grad():
        rows = [
            model(row.unsqueeze(0), use_cache=False).logits.float()
            for row in torch.from_numpy(np.load(tokens))
        ]
    np.save(logits, torch.cat(rows).numpy())


if __name__ == "__main__":
    main(sys.argv[1:])
