"""Tokens a second on this machine, of several models in turn, so that noise meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Speed:
    """Of one model; medians over rounds.

    Attributes:
        prefill_tokens_per_s: Of a prompt.
        decode_tokens_per_s: Of greedy generation, one sequence.
        decode_cpu_ms_per_token: CPU time of all threads.
        memory_bytes: Of weights and buffers, once loaded.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_cpu_ms_per_token: float
    memory_bytes: int

    def describe(self) -> dict[str, Any]:
        """JSON types only."""
        return {key: round(value, 3) for key, value in asdict(self).items()}


@torch.no_grad()
def measure(
    models: Mapping[str, Any], prompt_tokens: int, new_tokens: int, rounds: int
) -> dict[str, Speed]:
    """Times models against each other.

    Args:
        models: By name, as a target's `load` gives them.
        prompt_tokens: Of the prompt, drawn at random.
        new_tokens: To generate.
        rounds: How often; a first one is not counted.
    """
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds + 1):
        for name, model in models.items():
            vocab_size = model.config.get_text_config().vocab_size
            prompt = torch.randint(vocab_size, (1, prompt_tokens), generator=generator)
            figures[name].append(_once(model, prompt, new_tokens))
    speeds = {}
    for name, model in models.items():
        prefill, decode, cpu = zip(*figures[name][1:], strict=True)
        speeds[name] = Speed(
            statistics.median(prefill),
            statistics.median(decode),
            statistics.median(cpu),
            model.get_memory_footprint(),
        )
    return speeds


def _once(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float, float]:
    began = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    prefill_s = time.perf_counter() - began
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(new_tokens):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    decode_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    return prompt.shape[1] / prefill_s, new_tokens / decode_s, 1000 * cpu_s / new_tokens
