"""Text that a model generates itself, where there is no other (LLM-QAT, Liu et al., 2305.17888).

A chat model generates conversations: the text of a user after what its template puts before it
(Magpie, Xu et al., arXiv 2406.08464), then an answer after the template's generation prompt.

Shapes: N samples of T tokens.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compression.chat import answer_prompt, query_prefix
from compression.progress import bar
from core.errors import ConfigError, Interrupted
from trainer.data.files import StopRequested

_ROWS = 16  # samples that are generated at once
_QUERY_TOKENS = 64  # longest text of a user


@torch.no_grad()
def generate_samples(
    model: Path, num_samples: int, max_seq_len: int, seed: int, stop_requested: StopRequested
) -> Tensor:
    """Returns samples that are drawn from a model's own distribution.

    Args:
        model: A Hugging Face folder, which is loaded whole.
        num_samples: Number of samples N.
        max_seq_len: Number of tokens T of a sample.
        seed: Seed of the draws; the same seed gives the same samples.
        stop_requested: Function that is called between batches.

    Returns:
        Token ids (N, T) int64.

    Raises:
        ConfigError: The model has no token that starts a text.
        Interrupted: A stop was requested.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    make = _conversations if tokenizer.chat_template is not None else _texts
    torch.manual_seed(seed)
    batches = []
    num_batches = -(-num_samples // _ROWS)
    with bar("generating text", "batch") as advance:
        for number in range(num_batches):
            advance(number, num_batches)
            if stop_requested():
                raise Interrupted("stopped while generating text; nothing was lost")
            rows = min(_ROWS, num_samples - number * _ROWS)
            batches.append(make(loaded, tokenizer, rows, max_seq_len))
        advance(num_batches, num_batches)
    return torch.cat(batches)


def _texts(model: Any, tokenizer: Any, rows: int, max_seq_len: int) -> Tensor:
    """Returns texts (rows, T) that follow the token that starts a text, and do not end early."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        fix = "give data=text data.path=notes.txt"
        raise ConfigError("data", "null", "the model has no token that starts a text", fix)
    # All rows are drawn to the full length, so that nothing is padded.
    settings = {"min_new_tokens": max_seq_len - 1, "pad_token_id": first}
    return _sample(model, [[first]] * rows, max_seq_len - 1, **settings)


def _conversations(model: Any, tokenizer: Any, rows: int, max_seq_len: int) -> Tensor:
    """Returns conversations (rows, T): a user's text, an answer, and what follows an early end."""
    before = query_prefix(tokenizer)
    # A quarter of the sample at most is the question, so that answers make up most of it.
    size = min(_QUERY_TOKENS, max_seq_len // 4)
    if len(before) + size >= max_seq_len:
        rule = f"the chat template puts {len(before)} tokens before the text of a user"
        raise ConfigError("calibration.max_seq_len", max_seq_len, rule, "raise it")
    model.generation_config.eos_token_id = None  # the end of a turn is not the end of a sample
    ends = set(tokenizer.all_special_ids)
    prompts = []
    for row in _sample(model, [before] * rows, size).tolist():
        query = list(takewhile(lambda token: token not in ends, row[len(before) :]))
        prompts.append(answer_prompt(tokenizer, tokenizer.decode(query))[:max_seq_len])
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    answered = _sample(model, prompts, max_seq_len - shortest)
    starts = [longest - len(prompt) for prompt in prompts]  # padding is on the left
    return torch.stack(
        [row[start : start + max_seq_len] for row, start in zip(answered, starts, strict=True)]
    )


def _sample(model: Any, prompts: list[list[int]], num_tokens: int, **settings: int) -> Tensor:
    """Returns prompts, padded on the left, each followed by the tokens that the model draws."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    # Plain sampling: any truncation would shift the samples away from the model's distribution.
    drawn: Tensor = model.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=num_tokens,
        **settings,
    )
    return drawn
