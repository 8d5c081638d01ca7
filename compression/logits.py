"""Computes the logits of an artifact, as a program that ends with what it loaded.

    python -m compression.logits TARGET ARTIFACT TOKENS.npy LOGITS.npy

Shapes: N samples of T tokens, V vocabulary.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import torch


@torch.no_grad()
def main(target: str, artifact: str, tokens: str, logits: str) -> None:
    """Entry point.

    Args:
        target: What the artifact was packed for.
        artifact: Its folder.
        tokens: File of (N, T) int64.
        logits: File to write, of (N, T, V) float32.
    """
    model = importlib.import_module(f"compression.targets.{target}").load(Path(artifact))
    rows = [
        model(row.unsqueeze(0), use_cache=False).logits.float()
        for row in torch.from_numpy(np.load(tokens, allow_pickle=False))
    ]
    np.save(logits, torch.cat(rows).numpy(), allow_pickle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
