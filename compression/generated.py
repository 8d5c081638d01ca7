"""Text that a model makes itself, for want of any other (LLM-QAT, Liu et al., arXiv 2305.17888).

Shapes: N samples of T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compression.progress import bar
from monitoring.errors import ConfigError, Interrupted
from trainer.data.files import StopRequested

_ROWS = 16  # that are generated at once


@torch.no_grad()
def generate_samples(
    model: Path, num_samples: int, max_seq_len: int, seed: int, stop_requested: StopRequested
) -> Tensor:
    """Samples drawn from a model's own distribution, each from the start of a text on.

    Args:
        model: A Hugging Face folder; it is loaded whole.
        num_samples: N.
        max_seq_len: T.
        seed: The same one draws the same.
        stop_requested: Asked between batches.

    Returns:
        (N, T) int64.

    Raises:
        ConfigError: It has no token to start with, or fewer positions.
        Interrupted: Told to stop.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        fix = "give data=text data.path=notes.txt, or the like"
        raise ConfigError("data", "null", "the model has no token that starts a text", fix)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", max_seq_len)
    if max_seq_len > longest:
        rule = f"the model has {longest} positions"
        raise ConfigError("calibration.max_seq_len", max_seq_len, rule, f"use {longest}")
    torch.manual_seed(seed)
    batches = []
    num_batches = -(-num_samples // _ROWS)
    with bar("generating text", "batch") as advance:
        for number in range(num_batches):
            advance(number, num_batches)
            if stop_requested():
                raise Interrupted("stopped while generating text; nothing was lost")
            rows = min(_ROWS, num_samples - number * _ROWS)
            length = {"min_new_tokens": max_seq_len - 1, "max_new_tokens": max_seq_len - 1}
            prompt = torch.full((rows, 1), first)
            batches.append(
                loaded.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    pad_token_id=first,
                    **length,
                )
            )
        advance(num_batches, num_batches)
    return torch.cat(batches)
