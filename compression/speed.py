"""Measures tokens/s of several models on this machine, in alternation, so that noise is shared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch


class Timing(NamedTuple):
    """Speed of one prompt and of the tokens generated after it (greedy, one sequence).

    Attributes:
        prefill_tokens_per_s: Speed of the prompt.
        decode_tokens_per_s: Speed of new tokens.
        decode_cpu_ms_per_token: CPU time of all threads for a new token.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_cpu_ms_per_token: float


class Runner(Protocol):
    """A model that can be timed.

    Attributes:
        memory_bytes: Memory of the weights and buffers while the model runs.
        dtype: Type in which the model computes, by torch's name; None if its engine decides.
    """

    @property
    def dtype(self) -> str | None: ...

    @property
    def memory_bytes(self) -> int: ...

    def once(self, prompt_tokens: int, new_tokens: int, seed: int) -> Timing:
        """Times a random prompt and the tokens generated after it."""
        ...


@dataclass(frozen=True)
class Speed:
    """Speed of one model: medians of `Timing` over rounds, with its memory and type."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_cpu_ms_per_token: float
    memory_bytes: int
    dtype: str | None

    def describe(self) -> dict[str, Any]:
        """Returns the figures as JSON types."""
        numbers = {key: value for key, value in asdict(self).items() if key != "dtype"}
        return {key: round(value, 3) for key, value in numbers.items()} | {"dtype": self.dtype}


class TorchRunner:
    """Times a model of transformers in this process."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def dtype(self) -> str | None:
        """Type in which the model computes, see `Runner`."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def memory_bytes(self) -> int:
        """Memory of the weights, see `Runner`.

        Some layers unpack their weights on the first forward: read it after that.
        """
        model = self._model
        return sum(map(_held_bytes, [*model.parameters(), *model.buffers()]))

    @torch.no_grad()
    def once(self, prompt_tokens: int, new_tokens: int, seed: int) -> Timing:
        """Times one prompt and new tokens, see `Runner`."""
        model = self._model
        vocab_size = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(vocab_size, (1, prompt_tokens), generator=generator)
        began = time.perf_counter()
        # Only the last position's logits: a server computes no others, and they would take long.
        output = model(prompt, use_cache=True, logits_to_keep=1)
        prefill_s = time.perf_counter() - began
        # `process_time` counts all threads: a model that keeps more cores busy shows that here.
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(new_tokens):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        decode_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        return Timing(prompt_tokens / prefill_s, new_tokens / decode_s, 1000 * cpu_s / new_tokens)

    @torch.no_grad()
    def layer_ms(self, names: Iterable[str]) -> dict[str, float]:
        """Returns the wall-clock milliseconds of each layer for one token, each run once."""
        found = {}
        # In order, so that a layer's weights have left the caches before its next round.
        for name in names:
            layer = self._model.get_submodule(name)
            x = torch.ones(1, 1, layer.in_features, dtype=self._model.dtype)
            began = time.perf_counter()
            layer(x)
            found[name] = 1000 * (time.perf_counter() - began)
        return found


def _held_bytes(tensor: Any) -> int:
    """Returns the bytes of a tensor, or of the tensors inside one of torchao's."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    size: int = tensor.numel() * tensor.itemsize
    return size


def measure(
    runners: Mapping[str, Runner], prompt_tokens: int, new_tokens: int, rounds: int
) -> dict[str, Speed]:
    """Times models in alternation and returns their speeds.

    Args:
        runners: Models by name.
        prompt_tokens: Number of tokens of the prompt.
        new_tokens: Number of tokens to generate.
        rounds: Number of rounds that count, after a warm-up round.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in runners}
    for seed in range(rounds + 1):
        for name, runner in runners.items():
            timings[name].append(runner.once(prompt_tokens, new_tokens, seed))
    speeds = {}
    for name, runner in runners.items():
        # Memory is read last, when every layer has unpacked what it unpacks.
        prefill, decode, cpu = map(statistics.median, zip(*timings[name][1:], strict=True))
        speeds[name] = Speed(prefill, decode, cpu, runner.memory_bytes, runner.dtype)
    return speeds
