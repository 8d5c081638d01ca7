"""Measures what more bits cost in decoding time on this machine, for each layer, for `mixed`.

The model is rounded, packed and loaded as the target does it, once with few bits everywhere and
once with more; each layer of both is timed inside its model, on one token. The timed kernels are
those that the artifact will run, and their weights come from memory as they do in decoding.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from compression.config import EvaluationConfig
from compression.layerwise import compress
from compression.methods.rounding import RoundToNearest
from compression.progress import Advance
from compression.recipe import MixedConfig
from compression.result import Result
from compression.scheme import Scheme
from compression.speed import Runner, TorchRunner, measure
from compression.targets.packing import torch_runner
from core.errors import ConfigError

_LAYER_ROUNDS = 5  # rounds of layer timings for each round of the evaluation


@dataclass(frozen=True)
class DecodeCost:
    """Wall-clock milliseconds of one new token, in the model and in each layer.

    Attributes:
        parent_tokens_per_s: Decoding speed of the parent, timed in alternation with the others.
        low_ms: Time of the whole model with few bits everywhere.
        layer_ms: Time of each layer with few bits, and with more.
    """

    parent_tokens_per_s: float
    low_ms: float
    layer_ms: dict[str, tuple[float, float]]

    def added_ms(self, layers: Iterable[str]) -> float:
        """Returns the time that more bits for some layers add; negative if they are faster."""
        return math.fsum(high - low for low, high in (self.layer_ms[name] for name in layers))

    def least_ms(self, added_ms: Mapping[str, float]) -> float:
        """Returns the time of the fastest assignment, given the time that each part adds."""
        return self.low_ms + math.fsum(min(0.0, ms) for ms in added_ms.values())

    def predicted_ms(self, schemes: Mapping[str, Scheme], high: Scheme) -> float:
        """Returns the predicted time of an assignment of schemes to layers."""
        chosen = [name for name, scheme in schemes.items() if scheme == high]
        return self.low_ms + self.added_ms(chosen)

    def check(self, step: MixedConfig, key: str, added_ms: Mapping[str, float]) -> None:
        """Raises ConfigError if no assignment reaches the budget, and names the fastest.

        Args:
            step: The step with the budget.
            key: The step's key, for errors.
            added_ms: Time that more bits add, for each part.
        """
        assert step.budget_tokens_per_s is not None
        fastest = 1000 / self.least_ms(added_ms)
        if step.budget_tokens_per_s <= fastest:
            return
        every_high = 1000 / (self.low_ms + math.fsum(added_ms.values()))
        rule = (
            f"the fastest assignment of bits reaches {fastest:.4g} tokens/s here "
            f"({step.bits} bits everywhere: {1000 / self.low_ms:.4g}, {step.high_bits} bits: "
            f"{every_high:.4g}, the parent: {self.parent_tokens_per_s:.4g})"
        )
        fix = "lower the budget, or choose a target or machine that decodes faster with fewer bits"
        raise ConfigError(f"{key}.budget_tokens_per_s", step.budget_tokens_per_s, rule, fix)

    def describe(self) -> dict[str, Any]:
        """Returns the measurement as JSON types."""
        return asdict(self)

    @classmethod
    def parse(cls, described: dict[str, Any]) -> DecodeCost:
        """Returns the measurement that `describe` wrote, after a round trip through JSON."""
        layers = {name: (low, high) for name, (low, high) in described["layer_ms"].items()}
        return cls(described["parent_tokens_per_s"], described["low_ms"], layers)


class TimedTarget(Protocol):
    """A target whose artifacts this process can time; see `compression.run.Packer`."""

    def pack(self, result: Result, source: Path, out: Path) -> None: ...

    def runner(self, folder: Path) -> Runner | None: ...


def measure_cost(
    model: Path,
    layers: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    schemes: tuple[Scheme, Scheme],
    dtypes: tuple[torch.dtype, torch.dtype],
    target: TimedTarget,
    settings: EvaluationConfig,
    folder: Path,
    advance: Advance,
) -> DecodeCost:
    """Measures the decoding time of all layers with few bits and with more.

    Holds three whole models in memory.

    Args:
        model: A dense Hugging Face folder.
        layers: Names of the layers, with the number of their block.
        shapes: Outputs and inputs of each layer; layers of one shape are taken to cost the same.
        schemes: The scheme of few bits, and the one of more.
        dtypes: Type of what is not quantized, and type of scales.
        target: Target of the artifact.
        settings: Lengths and rounds, as in the evaluation.
        folder: Folder for temporary artifacts.
        advance: Called with the number of packed blocks and their total.
    """
    runners: dict[str, TorchRunner] = {}
    for which, scheme in zip(("low", "high"), schemes, strict=True):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            codes, packed = Path(name) / "codes", Path(name) / "packed"
            codes.mkdir()
            packed.mkdir()
            result = Result(codes, *dtypes)
            compress(model, {which: RoundToNearest(scheme)}, layers, None, result, advance)
            target.pack(result, model, packed)
            runners[which] = _in_process(target.runner(packed))
    everyone = {"parent": torch_runner(model), **runners}
    speeds = measure(everyone, settings.prompt_tokens, settings.new_tokens, settings.rounds)
    rounds: dict[str, list[dict[str, float]]] = {"low": [], "high": []}
    # All models are held at once and timed in alternation, so that noise of the machine reaches
    # each of them alike.
    for _ in range(settings.rounds * _LAYER_ROUNDS):
        for which, runner in runners.items():
            rounds[which].append(runner.layer_ms(layers))
    low, high = (_by_shape(rounds[which], shapes) for which in ("low", "high"))
    layer_ms = {name: (low[shape], high[shape]) for name, shape in shapes.items()}
    return DecodeCost(
        speeds["parent"].decode_tokens_per_s, 1000 / speeds["low"].decode_tokens_per_s, layer_ms
    )


def _in_process(runner: Runner | None) -> TorchRunner:
    assert isinstance(runner, TorchRunner)  # `check_layer_times` has refused all other targets
    return runner


def _by_shape(
    rounds: list[dict[str, float]], shapes: Mapping[str, tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """Returns the median over all layers of a shape, and all rounds."""
    found: dict[tuple[int, int], list[float]] = {}
    for name, shape in shapes.items():
        found.setdefault(shape, []).extend(ms[name] for ms in rounds)
    return {shape: statistics.median(values) for shape, values in found.items()}
