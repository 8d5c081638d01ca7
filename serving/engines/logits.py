"""Computes the logits of a dense folder with transformers, in a fresh process.

    python -m serving.engines.logits FOLDER TOKENS.npy LOGITS.npy

Shapes: N samples of T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from compression.targets.packing import load_folder
from trainer.attention import plain_attention


@torch.no_grad()
def main(folder: Path, tokens: Path, out: Path) -> None:
    """Reads (N, T) token ids and writes (N, T, V) float32 logits."""
    attention = plain_attention(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    model = load_folder(folder, attention=attention)
    # One row at a time, to hold the activations of a single sequence only.
    rows = torch.from_numpy(np.load(tokens, allow_pickle=False)).unsqueeze(1)
    logits = [model(input_ids=row, use_cache=False).logits.float() for row in rows]
    np.save(out, torch.cat(logits).numpy(), allow_pickle=False)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
