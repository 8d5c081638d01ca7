"""Runs the steps of a recipe in order, in stages: runs of block steps, and single model steps.

Each stage but the last leaves an ordinary Hugging Face folder, from which the next one starts.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression import progress
from compression.config import CompressionConfig, Target
from compression.decode_cost import DecodeCost, TimedTarget, measure_cost
from compression.evaluate import perplexity
from compression.heal import heal
from compression.layerwise import compress
from compression.methods.gptq import Gptq
from compression.mixed import choose_schemes, describe, measure_kl, parts_of, shapes_of
from compression.recipe import (
    BlockStep,
    HealConfig,
    Method,
    MixedConfig,
    ModelStep,
    PruneConfig,
    QatConfig,
    Step,
    StructuredPruneConfig,
)
from compression.result import Result
from compression.samples import Samples, data_config
from compression.source import check_shapes, choose_layers
from compression.stream import BlockStream
from compression.structured.prune import prune_structured
from compression.targets import huggingface
from core.folder import staged_folder


class Stages:
    """Runs the stages of one recipe.

    Attributes:
        notes: Report of each step that needs the whole model.

    Args:
        config: Settings of the compression.
        parent: Folder of the model to start from.
        samples: Samples for calibration and evaluation.
        packers: Packers by target.
        work: Folder for finished stages, which are not run again.
        stop_requested: Function that is polled.
    """

    def __init__(
        self,
        config: CompressionConfig,
        parent: Path,
        samples: Samples,
        packers: Mapping[Target, TimedTarget],
        work: Path,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.notes: dict[str, Any] = {}
        self._config, self._parent, self._samples = config, parent, samples
        self._packers, self._work, self._stop_requested = packers, work, stop_requested
        self._has_zeros = False

    def run(self) -> tuple[Path, Result]:
        """Runs all stages; returns the last dense model, and the result of its blocks.

        Raises:
            ConfigError: A size that an earlier step left does not fit a later step.
            Interrupted: A stop was requested; the same call goes on from there.
        """
        model = self._parent
        stages = list(_stages(self._config.recipe))
        for number, steps in enumerate(stages[:-1]):
            folder = self._work / f"{number:02d}-{'+'.join(steps)}"
            ((name, step), *_) = steps.items()
            if isinstance(step, HealConfig):
                model = self._heal(model, name, step, folder)
            elif isinstance(step, QatConfig):
                # The trainer has no float16 for scales, which gguf stores: float32 is closer to it
                # than bfloat16.
                is_bf16 = self._config.scale_dtype == "bfloat16"
                training = step.training("bfloat16" if is_bf16 else "float32")
                model = self._trained(model, training, folder)
            elif isinstance(step, StructuredPruneConfig):
                model = self._prune(model, name, step, folder)
            else:
                # float32 between stages, so that only the last stage rounds to the artifact's type.
                result = self._compress(model, steps, folder, torch.float32)
                dense = folder.with_name(f"{folder.name}-dense")
                if not dense.exists():
                    with staged_folder(dense) as staging:
                        huggingface.pack(result, model, staging)
                model = dense
        dtype: torch.dtype = getattr(torch, self._config.dtype.value)
        return model, self._compress(model, stages[-1], self._work / "result", dtype)

    def _compress(
        self, model: Path, steps: Mapping[str, Step], folder: Path, dtype: torch.dtype
    ) -> Result:
        """Runs steps that work on one block after another."""
        stream = BlockStream(model)
        layers = choose_layers(stream, self._config.layers.include, self._config.layers.exclude)
        methods = {}
        for name, step in steps.items():
            assert isinstance(step, BlockStep)
            check_shapes(stream, layers, f"recipe.{name}", step)
            methods[name] = step.build()
            if isinstance(step, MixedConfig):
                methods[name] = self._mixed(model, name, step, layers)
            self._has_zeros = self._has_zeros or isinstance(step, PruneConfig)
        needs_data = any(method.needs_data for method in methods.values())
        calibration: Tensor | None = self._samples.calibration if needs_data else None
        folder.mkdir(exist_ok=True)
        scale_dtype: torch.dtype = getattr(torch, self._config.scale_dtype)
        result = Result(folder, dtype, scale_dtype)
        with progress.bar("+".join(steps) or "writing") as advance:
            compress(model, methods, layers, calibration, result, advance, self._stop_requested)
        return result

    def _trained(self, model: Path, step: HealConfig, folder: Path) -> Path:
        """Returns a model that was trained towards the parent."""
        folder.mkdir(exist_ok=True)
        return heal(
            model,
            self._parent,
            step,
            data_config(self._config),
            self._has_zeros,
            self._config.seed,
            folder,
            self._stop_requested,
        )

    def _mixed(
        self, model: Path, name: str, step: MixedConfig, layers: Mapping[str, int]
    ) -> Method:
        """Returns GPTQ with bits chosen by measured KL.

        The measurement is kept in the work folder.
        """
        stream, told = BlockStream(model), self._work / f"{name}.json"
        scale_dtype: torch.dtype = getattr(torch, self._config.scale_dtype)
        cost = None
        shapes = shapes_of(stream, layers)
        if step.budget_tokens_per_s is not None:
            cost = self._decode_cost(model, name, step, layers, shapes)
            parts = parts_of(layers)
            cost.check(step, f"recipe.{name}", {p: cost.added_ms(n) for p, n in parts.items()})
        if not told.exists():
            with (
                tempfile.TemporaryDirectory(dir=self._work) as scratch,
                progress.bar(f"{name}: what few bits cost") as advance,
            ):
                ids = self._samples.calibration[: step.samples]
                low, _ = step.schemes()
                kl = measure_kl(stream, layers, low, scale_dtype, ids, Path(scratch), advance)
            told.write_text(json.dumps(kl))
        kl = json.loads(told.read_text())
        schemes = choose_schemes(step, f"recipe.{name}", kl, shapes, scale_dtype.itemsize, cost)
        self.notes[name] = {"parts": describe(kl, schemes)}
        if cost is not None:
            _, high = step.schemes()
            predicted = 1000 / cost.predicted_ms(schemes, high)
            self.notes[name] |= {"predicted_tokens_per_s": predicted, "decode": cost.describe()}
        return Gptq(step.scheme(), step.damping, schemes)

    def _decode_cost(
        self,
        model: Path,
        name: str,
        step: MixedConfig,
        layers: Mapping[str, int],
        shapes: Mapping[str, tuple[int, int]],
    ) -> DecodeCost:
        """Returns the decoding time of bits, which is measured once.

        It is kept in the work folder, so that a resumed command makes the same choice.
        """
        told = self._work / f"{name}-decode.json"
        if not told.exists():
            (packer,) = self._packers.values()
            dtype: torch.dtype = getattr(torch, self._config.dtype.value)
            scale_dtype: torch.dtype = getattr(torch, self._config.scale_dtype)
            with (
                tempfile.TemporaryDirectory(dir=self._work) as scratch,
                progress.bar(f"{name}: what bits cost in time") as advance,
            ):
                cost = measure_cost(
                    model,
                    layers,
                    shapes,
                    step.schemes(),
                    (dtype, scale_dtype),
                    packer,
                    self._config.evaluation,
                    Path(scratch),
                    advance,
                )
            told.write_text(json.dumps(cost.describe()))
        return DecodeCost.parse(json.loads(told.read_text()))

    def _prune(self, model: Path, name: str, step: StructuredPruneConfig, folder: Path) -> Path:
        """Returns the folder of the pruned, smaller model."""
        dense = folder.with_name(f"{folder.name}-dense")
        told = folder.with_name(f"{folder.name}.json")
        # The report is written last: without it the folder may be of an interrupted call.
        if not told.exists():
            shutil.rmtree(dense, ignore_errors=True)
            with progress.bar(name) as advance:
                notes = prune_structured(
                    model,
                    dense,
                    step,
                    self._samples.calibration,
                    folder,
                    advance,
                    self._stop_requested,
                    f"recipe.{name}",
                )
            told.write_text(json.dumps(notes))
        self.notes[name] = json.loads(told.read_text())
        return dense

    def _heal(self, model: Path, name: str, step: HealConfig, folder: Path) -> Path:
        """Returns the folder of the healed model, or of the one before if that is better."""
        healed = self._trained(model, step, folder)
        found = {}
        for which, path in (("before", model), ("after", healed)):
            with (
                tempfile.TemporaryDirectory(dir=folder) as scratch,
                progress.bar(f"{name}: {which}") as advance,
            ):
                ids = self._samples.evaluation
                found[which] = perplexity(BlockStream(path), ids, Path(scratch), advance)
        is_better = found["after"] < found["before"]
        self.notes[name] = {
            "perplexity_before": found["before"],
            "perplexity_after": found["after"],
            "accepted": is_better,
        }
        said = "taken" if is_better else "worse than before: not taken"
        print(f"{name}: perplexity {found['before']:.4f} -> {found['after']:.4f}, {said}")
        return healed if is_better else model


def _stages(recipe: Mapping[str, Step]) -> Iterator[dict[str, Step]]:
    """Yields the stages of a recipe: block steps in a row, and each model step by itself.

    The last stage consists of block steps, even of none, since it writes the result.
    """
    is_of_model = False
    for is_of_model, group in groupby(recipe.items(), lambda item: isinstance(item[1], ModelStep)):
        if is_of_model:
            for name, step in group:
                yield {name: step}
                if isinstance(step, QatConfig):  # the last step, since it quantizes
                    yield {name: step.rounding()}
                    return
        else:
            yield dict(group)
    if is_of_model:
        # Nothing is quantized: an empty stage still rounds the blocks to the artifact's type.
        yield {}
