"""Tokens a second on this machine, of several models in turn, so that noise meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch


class Timing(NamedTuple):
    """Of one prompt, and what was generated after it, greedily, one sequence.

    Attributes:
        prefill_tokens_per_s: Of the prompt.
        decode_tokens_per_s: Of new tokens.
        decode_cpu_ms_per_token: CPU time of all threads for a new token.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_cpu_ms_per_token: float


class Runner(Protocol):
    """A model that can be timed.

    Attributes:
        memory_bytes: Of its weights and buffers, as they are held while it runs.
        dtype: In which it computes, as torch calls it; None where its engine decides.
    """

    @property
    def dtype(self) -> str | None: ...

    @property
    def memory_bytes(self) -> int: ...

    def once(self, prompt_tokens: int, new_tokens: int, seed: int) -> Timing:
        """Times a prompt of tokens drawn at random, and what follows it."""
        ...


@dataclass(frozen=True)
class Speed:
    """Of one model; medians over rounds, by the names of `Timing`, its memory and its type."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_cpu_ms_per_token: float
    memory_bytes: int
    dtype: str | None

    def describe(self) -> dict[str, Any]:
        """JSON types only."""
        numbers = {key: value for key, value in asdict(self).items() if key != "dtype"}
        return {key: round(value, 3) for key, value in numbers.items()} | {"dtype": self.dtype}


class TorchRunner:
    """A model of transformers, in this process."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def dtype(self) -> str | None:
        """See `Runner`."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def memory_bytes(self) -> int:
        """See `Runner`; some layers unpack their weights when they first run, so ask after that."""
        model = self._model
        return sum(map(_held_bytes, [*model.parameters(), *model.buffers()]))

    @torch.no_grad()
    def once(self, prompt_tokens: int, new_tokens: int, seed: int) -> Timing:
        """See `Runner`."""
        model = self._model
        vocab_size = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(vocab_size, (1, prompt_tokens), generator=generator)
        began = time.perf_counter()
        output = model(prompt, use_cache=True, logits_to_keep=1)
        prefill_s = time.perf_counter() - began
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(new_tokens):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        decode_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        return Timing(prompt_tokens / prefill_s, new_tokens / decode_s, 1000 * cpu_s / new_tokens)

    @torch.no_grad()
    def layer_ms(self, names: Iterable[str]) -> dict[str, float]:
        """Wall-clock milliseconds of each layer for one token, one after another, each once."""
        found = {}
        for name in names:
            layer = self._model.get_submodule(name)
            x = torch.ones(1, 1, layer.in_features, dtype=self._model.dtype)
            began = time.perf_counter()
            layer(x)
            found[name] = 1000 * (time.perf_counter() - began)
        return found


def _held_bytes(tensor: Any) -> int:
    """Of a tensor, or of the tensors that one of torchao's is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    size: int = tensor.numel() * tensor.itemsize
    return size


def measure(
    runners: Mapping[str, Runner], prompt_tokens: int, new_tokens: int, rounds: int
) -> dict[str, Speed]:
    """Times models against each other.

    Args:
        runners: By name.
        prompt_tokens: Of the prompt.
        new_tokens: To generate.
        rounds: How often; a first one is not counted.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in runners}
    for seed in range(rounds + 1):
        for name, runner in runners.items():
            timings[name].append(runner.once(prompt_tokens, new_tokens, seed))
    speeds = {}
    for name, runner in runners.items():
        prefill, decode, cpu = map(statistics.median, zip(*timings[name][1:], strict=True))
        speeds[name] = Speed(prefill, decode, cpu, runner.memory_bytes, runner.dtype)
    return speeds
