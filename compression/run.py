"""One compression, from checking the parent to the artifacts that were loaded again.

<out>/<target>/     a Hugging Face folder with lineage.json, and compression.json: the recipe,
                    what it did, and what it cost in quality
<out>/.work/        a stopped compression goes on from here
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compression import progress
from compression.artifact import (
    REPORT,
    WORK,
    check_replaceable,
    layer_bytes,
    lineage,
    places,
    weight_bytes,
)
from compression.config import CompressionConfig, Target
from compression.evaluate import Quality, compare, final_hidden
from compression.layerwise import compress
from compression.recipe import PruneConfig, Step
from compression.reload import ReloadError, logits_of, signal_to_noise_db
from compression.report import plot_pareto, print_report
from compression.result import Result
from compression.samples import Samples, draw_samples
from compression.scheme import Scheme
from compression.source import Source, check_shapes, choose_layers
from compression.speed import Speed, measure
from compression.stream import BlockStream
from monitoring.environment import describe_environment
from parallel.config import Dtype

_RELOADED = 2  # samples that a packed artifact is compared on
# It computes in its own type, the comparison in float32: bfloat16 leaves about 40 dB of a model.
_LEAST_DB = {Dtype.bfloat16: 20.0, Dtype.float32: 60.0}


class Packer(Protocol):
    """A module of `compression.targets`."""

    def check(self, schemes: set[Scheme], key: str) -> None:
        """Raises ConfigError for a result that cannot be packed, or served."""

    def pack(self, result: Result, source: Path, out: Path) -> None:
        """Writes a folder that loads."""


@dataclass(frozen=True)
class Evaluated:
    """What the result computes before it is packed.

    Attributes:
        quality: Against the parent.
        logits: Of the first evaluation samples, (N, T, V).
    """

    quality: Quality
    logits: Tensor


def run(config: CompressionConfig, stop_requested: Callable[[], bool]) -> Path:
    """Compresses, evaluates, packs and checks; returns the folder of the artifacts.

    Raises:
        ConfigError: Something does not fit; nothing was written.
        Interrupted: Told to stop; the same command goes on.
        ReloadError: A packed artifact does not do what it should; it is not left behind.
    """
    # 1. What can be refused is refused before any work
    config.check()
    parent, out = places(config)
    source = Source.open(parent)
    steps: Mapping[str, Step] = config.recipe
    layers = _layers(config, parent)
    packers: dict[Target, Packer] = {
        target: importlib.import_module(f"compression.targets.{target.value}")
        for target in config.targets
    }
    schemes = {
        step.scheme(f"recipe.{name}")
        for name, step in steps.items()
        if not isinstance(step, PruneConfig)
    }
    for packer in packers.values():
        packer.check(schemes, "target")
    check_replaceable(out)
    samples = draw_samples(config, parent, stop_requested)

    # 2. Block by block; a stopped compression finds its blocks in the work folder
    work = out / WORK
    (work / "result").mkdir(parents=True, exist_ok=True)
    result = Result(work / "result", getattr(torch, config.dtype.value))
    methods = {name: step.build(f"recipe.{name}") for name, step in steps.items()}
    needs_data = any(method.needs_data for method in methods.values())
    made_from = _made_from(config, source, samples if needs_data else None, layers)
    began = time.process_time()
    with progress.bar("compressing") as advance:
        compress(
            parent,
            methods,
            layers,
            samples.calibration if needs_data else None,
            result,
            made_from,
            advance,
            stop_requested,
        )
    cpu_s = time.process_time() - began

    with tempfile.TemporaryDirectory(dir=work) as name:
        scratch = Path(name)
        # 3. What is left of the parent
        evaluated = _evaluate(parent, result, samples.evaluation, scratch)
        report = {
            "format_version": 1,
            "recipe": config.recipe_name,
            "made_from": made_from,
            "evaluation": {"data_digest": samples.digest} | evaluated.quality.describe(),
            "layers": result.notes(),
            "compression_cpu_s": round(cpu_s, 1),
            "parent_weight_bytes": weight_bytes(parent),
            "environment": describe_environment(),
        }
        # 4. Packed, loaded by a process that knows nothing of this one, timed; only then in place
        for target, packer in packers.items():
            artifact = scratch / target.value
            packer.pack(result, parent, artifact)
            found = logits_of(artifact, samples.evaluation[:_RELOADED], scratch)
            snr_db = _check_logits(target, evaluated.logits, found, config.dtype)
            speeds = _speeds(config, parent, artifact)
            quantized = set(result.schemes())
            described = report | {
                "target": target.value,
                "reloaded_snr_db": round(snr_db, 1),
                "weight_bytes": weight_bytes(artifact),
                "quantized_layer_bytes": layer_bytes(artifact, quantized),
                "speed": {name: speed.describe() for name, speed in speeds.items()},
            }
            (artifact / REPORT).write_text(json.dumps(described, indent=1) + "\n")
            of_artifact = lineage(source, artifact, made_from)
            (artifact / "lineage.json").write_text(json.dumps(of_artifact, indent=1) + "\n")
            place = out / target.value
            if place.exists():
                shutil.rmtree(place)
            artifact.rename(place)
            print_report(place, described)
    shutil.rmtree(work)
    plot_pareto(out.parent)
    return out


def _layers(config: CompressionConfig, parent: Path) -> dict[str, int]:
    stream = BlockStream(parent)
    layers = choose_layers(stream, config.layers.include, config.layers.exclude)
    for name, step in config.recipe.items():
        check_shapes(stream, layers, f"recipe.{name}", step)
    return layers


def _made_from(
    config: CompressionConfig, source: Source, samples: Samples | None, layers: Mapping[str, int]
) -> dict[str, Any]:
    """All that decides what comes out."""
    calibration = None
    if samples is not None:
        tokens = samples.calibration
        calibration = {
            "data_digest": samples.digest,
            "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "num_samples": tokens.shape[0],
            "max_seq_len": tokens.shape[1],
        }
    steps = {
        name: {"kind": type(step).__name__, **_plain(asdict(step))}
        for name, step in config.recipe.items()
    }
    return {
        "parent": source.digests,
        "steps": steps,
        "layers": list(layers),
        "dtype": config.dtype.value,
        "calibration": calibration,
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v.value if isinstance(v, Enum) else v for k, v in settings.items()}


def _evaluate(parent: Path, result: Result, input_ids: Tensor, scratch: Path) -> Evaluated:
    streams = {"parent": BlockStream(parent), "child": BlockStream(parent, result.put_into)}
    total = sum(len(stream.blocks) for stream in streams.values())
    hidden, done = {}, 0
    with progress.bar("evaluating") as advance:
        advance(0, total)

        def next_block() -> None:
            nonlocal done
            done += 1
            advance(done, total)

        for name, stream in streams.items():
            folder = scratch / f"hidden-{name}"
            folder.mkdir()
            hidden[name] = final_hidden(stream, input_ids, folder, next_block)
    quality = compare(
        streams["parent"], hidden["parent"], streams["child"], hidden["child"], input_ids
    )
    with torch.no_grad():
        first = next(hidden["child"].batches())[:_RELOADED]
        logits = streams["child"].logits(first)
    return Evaluated(quality, logits)


def _check_logits(target: Target, wanted: Tensor, found: Tensor, dtype: Dtype) -> float:
    """The artifact's logits against the result's, in dB.

    Raises:
        ReloadError: They are another model's.
    """
    found = found[: len(wanted)]
    snr_db = signal_to_noise_db(wanted, found)
    if not snr_db >= _LEAST_DB[dtype]:
        raise ReloadError(
            f"target={target.value}: loaded again, its logits are {snr_db:.1f} dB from what the "
            f"compressed weights compute, not {_LEAST_DB[dtype]:.0f}; it was not kept"
        )
    return snr_db


def _speeds(config: CompressionConfig, parent: Path, artifact: Path) -> dict[str, Speed]:
    settings = config.evaluation
    if not settings.speed:
        return {}
    folders = {"parent": parent, "child": artifact}
    return measure(folders, settings.prompt_tokens, settings.new_tokens, settings.rounds)
