"""Runs one compression, from the checks of the parent to artifacts that were loaded again.

<out>/<target>/     a Hugging Face folder with lineage.json, and compression.json: the recipe,
                    its effects, and the loss of quality
<out>/rejected.json the same report for a result that did not pass the gate and left no artifact
<out>/.work/        state from which a stopped compression resumes, also with another gate
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compression import progress
from compression.artifact import (
    LOCK,
    REJECTED,
    WORK,
    check_replaceable,
    claim,
    held,
    origin,
    places,
    weight_bytes,
)
from compression.config import AUTO, CompressionConfig, EvaluationConfig, LayersConfig, Target
from compression.evaluate import Quality, compare, final_hidden, logits_of
from compression.gate import GateError, failures
from compression.heal import check_overrides
from compression.mixed import check_budget, shapes_of
from compression.recipe import HealConfig, MixedConfig, QatConfig, StructuredPruneConfig
from compression.reload import Beside, ReloadError, reload, signal_to_noise_db
from compression.report import print_report
from compression.result import Result
from compression.samples import Samples, data_config, draw_samples, window_of
from compression.scheme import Activation, Scheme
from compression.source import Source, check_shapes, choose_layers
from compression.speed import Runner, Speed, measure
from compression.stage_runner import Stages
from compression.stream import BlockStream
from compression.structured.prune import check as check_structured
from compression.targets.names import StoredNames
from compression.targets.packing import torch_runner
from core import layout
from core.errors import ConfigError, Interrupted
from core.folder import commit, write_lineage
from core.settings.rules import check_settings
from monitoring.environment import describe_environment
from parallel.config import Dtype

_PROMPT_TOKENS = 128  # length of the timed prompt for evaluation.prompt_tokens=auto
_RELOADED = 2  # number of samples whose logits are compared with those of a packed artifact
# The artifact computes in its own type, the comparison in float32: bfloat16 leaves about 40 dB.
_LEAST_DB = {Dtype.bfloat16: 20.0, Dtype.float32: 60.0}
# Every engine rounds inputs at run time a little differently: compressed-tensors divides the
# largest magnitude by 127.5, vLLM and torchao by 127.
_LEAST_DB_OF_ROUNDED_INPUTS = 10.0


class Packer(Protocol):
    """Functions that each module of `compression.targets` has."""

    def check(self, schemes: set[Scheme], key: str) -> None:
        """Raises ConfigError for schemes that the target cannot pack, or no engine can load."""

    def check_parent(
        self, parent: Path, layers: Collection[str], schemes: set[Scheme], key: str
    ) -> None:
        """Raises ConfigError for a model, or layers of a model, that the target cannot hold."""

    def pack(self, result: Result, source: Path, out: Path) -> None:
        """Writes a result as a folder that can be loaded."""

    def load(self, folder: Path) -> Any:
        """Returns the model of such a folder: token ids in, logits out."""

    def runner(self, folder: Path, dtype: torch.dtype | None = None) -> Runner | None:
        """Returns a packed model to time, in its own or another type; None: it cannot be timed."""

    def check_layer_times(self, key: str) -> None:
        """Raises ConfigError if the layers of an artifact cannot be timed one at a time."""

    def layer_bytes(self, folder: Path, layers: set[str]) -> int | None:
        """Returns the bytes that a folder stores for some layers; None if it does not say."""


def run(config: CompressionConfig, stop_requested: Callable[[], bool]) -> Path:
    """Compresses, evaluates, packs and checks; returns the folder of the artifacts.

    Raises:
        ConfigError: Settings, model or data do not fit; nothing was written.
        Interrupted: A stop was requested; the same command goes on from there.
        GateError: The result is not good enough; its report is left, and no artifact.
        ReloadError: An artifact does not compute what it should, and was removed.
    """
    # 1. Refuse what can be refused before any work
    check_settings(config)
    parent, out = places(config)
    source = Source.open(parent)
    layers = _check_layers(config, parent)
    packers = _packers(config, parent, layers)
    check_replaceable(out, config.recipe_name, parent)
    config = replace(config, evaluation=_timed(config.evaluation, parent))
    samples = draw_samples(config, parent, stop_requested)

    # 2. Compress stage by stage, block by block; the work folder holds what a stopped command did
    work = out / WORK
    made_from = _made_from(config, source, samples)
    # Noted before `held` makes them, so that a refusal can remove them again.
    made = [folder for folder in (out, out.parent) if not folder.exists()]
    with held(out):
        claim(work, made_from)
        stages = Stages(config, parent, samples, packers, work, stop_requested)
        began = time.process_time()
        try:
            model, result = stages.run()
        except ConfigError:
            # Such as weights that are NaN after an earlier step: the command would fail again.
            _forget(work, made)
            raise
        cpu_s = time.process_time() - began
        warnings = _few_tokens(result.notes())
        for warning in warnings:
            print(f"warning: {warning}")

        with tempfile.TemporaryDirectory(dir=work) as name:
            scratch = Path(name)
            # 3. Compare the child with its parent
            evaluated = _evaluate(
                parent, model, result, samples.evaluation, scratch, stop_requested
            )
            report = {
                "format_version": 1,
                "recipe": config.recipe_name,
                "made_from": made_from,
                "evaluation": {"data_digest": samples.digest} | evaluated.quality.describe(),
                "stages": stages.notes,
                "layers": result.notes(),
                "warnings": warnings,
                "compression_cpu_s": round(cpu_s, 1),
                "parent_weight_bytes": weight_bytes(parent),
                "environment": describe_environment(),
                "gate": asdict(config.gate),
            }
            _judge(config, report, out)
            # 4. Pack, load in a fresh process, time, and only then move to the final place
            for target, packer in packers.items():
                artifact = scratch / target.value
                packer.pack(result, model, artifact)
                loaded = reload(
                    target,
                    artifact,
                    samples.evaluation,
                    _RELOADED,
                    evaluated.parent,
                    scratch,
                    stop_requested,
                )
                least_db = _least_db(target, config.dtype, result.schemes().values())
                snr_db = _check_logits(target, evaluated.logits, loaded.logits, least_db)
                speeds = _speeds(config, packer, parent, artifact)
                layer_bytes = packer.layer_bytes(artifact, set(result.schemes()))
                described = report | {
                    "target": target.value,
                    "reloaded_snr_db": round(snr_db, 1),
                    "as_loaded": {"dtype": loaded.dtype} | loaded.quality,
                    "weight_bytes": weight_bytes(artifact),
                    "quantized_layer_bytes": layer_bytes,
                    "speed": {name: speed.describe() for name, speed in speeds.items()},
                    "timed": _lengths(config.evaluation) if speeds else None,
                }
                (artifact / layout.COMPRESSION).write_text(json.dumps(described, indent=1) + "\n")
                write_lineage(artifact, origin(source, made_from))
                place = out / target.value
                commit(artifact, place, replace=True)
                print_report(place, described)
        shutil.rmtree(work)
    return out


def _few_tokens(notes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns warnings about layers that saw fewer tokens than they have inputs.

    Their Gram matrices have no full rank, so that methods cannot tell their inputs apart.
    """
    counts = {
        name: (note["calibration_tokens"], note["inputs"])
        for name, note in notes.items()
        if "calibration_tokens" in note
    }
    few = {name: (n, inputs) for name, (n, inputs) in counts.items() if n < inputs}
    if not few:
        return []
    name = min(few, key=lambda name: few[name][0])
    none = sum(n == 0 for n, _ in few.values())
    return [
        f"{len(few)} of {len(counts)} layers saw fewer calibration tokens than they have inputs, "
        f"{none} of them none (the fewest: {name}, {few[name][0]} for {few[name][1]} inputs); "
        "their weights are little better than rounded: raise calibration.num_samples"
    ]


def _judge(config: CompressionConfig, report: dict[str, Any], out: Path) -> None:
    """Raises GateError for a result that does not pass the gate, and removes older artifacts."""
    rejected = out / REJECTED
    rejected.unlink(missing_ok=True)
    failed = failures(config.gate, report["evaluation"])
    if not failed:
        return
    rejected.write_text(json.dumps(report | {"failed": failed}, indent=1) + "\n")
    # An artifact of an earlier command would be taken for the result of this one.
    for target in config.targets:
        shutil.rmtree(out / target.value, ignore_errors=True)
    raise GateError(failed, rejected)


def _forget(work: Path, made: list[Path]) -> None:
    """Removes the work folder, and folders that were made for it if they are empty."""
    shutil.rmtree(work)
    for folder in made:
        if {path.name for path in folder.iterdir()} <= {LOCK}:  # this command's own
            shutil.rmtree(folder)


def _timed(settings: EvaluationConfig, parent: Path) -> EvaluationConfig:
    """Returns the settings with auto resolved.

    Raises:
        ConfigError: More tokens are to be timed than the model has positions.
    """
    longest, asked = window_of(parent), settings.prompt_tokens
    prompt_tokens = _PROMPT_TOKENS if asked == AUTO else asked
    wanted = prompt_tokens + settings.new_tokens
    if not settings.speed or longest is None or wanted <= longest:
        return replace(settings, prompt_tokens=prompt_tokens)
    if asked != AUTO:
        rule = f"with evaluation.new_tokens it is {wanted}; the model has {longest} positions"
        raise ConfigError("evaluation.prompt_tokens", asked, rule, "use fewer")
    if settings.new_tokens >= longest:
        rule = f"leaves no room for a prompt in the model's {longest} positions"
        raise ConfigError("evaluation.new_tokens", settings.new_tokens, rule, "use fewer")
    prompt_tokens = longest - settings.new_tokens
    print(f"evaluation.prompt_tokens={prompt_tokens}: auto, by the model's positions ({longest})")
    return replace(settings, prompt_tokens=prompt_tokens)


def _check_layers(config: CompressionConfig, parent: Path) -> dict[str, int]:
    """Returns the parent's layers; raises ConfigError for steps that do not fit the parent.

    Steps behind a structured pruning are checked later, since they see another model.
    """
    stream = BlockStream(parent)
    layers = choose_layers(stream, config.layers.include, config.layers.exclude)
    for name, step in config.recipe.items():
        if isinstance(step, HealConfig | QatConfig):
            max_seq_len = data_config(config).max_seq_len  # raises if there is no data to train on
            step.check_one_step(f"recipe.{name}", max_seq_len)
            check_overrides(step.overrides, f"recipe.{name}.overrides")
        if isinstance(step, QatConfig):
            if config.layers != LayersConfig():
                rule = "training rounds every linear layer of the decoder blocks"
                fix = "leave out layers.include and layers.exclude"
                raise ConfigError(f"recipe.{name}", "qat", rule, fix)
            names = StoredNames(parent)
            expert = next((name for name in layers if names.is_expert(name)), None)
            if expert is not None:
                rule = f"training rounds linear layers only, not experts such as {expert}"
                raise ConfigError(f"recipe.{name}", "qat", rule, "use int4_gptq or int4_awq")
            step = step.rounding()
        if isinstance(step, HealConfig):
            continue
        if isinstance(step, StructuredPruneConfig):
            check_structured(parent, step, f"recipe.{name}")
            break  # later steps see another model
        check_shapes(stream, layers, f"recipe.{name}", step)
        if isinstance(step, MixedConfig):
            itemsize = getattr(torch, config.scale_dtype).itemsize
            check_budget(step, f"recipe.{name}", shapes_of(stream, layers), itemsize)
    return layers


def _packers(
    config: CompressionConfig, parent: Path, layers: Collection[str]
) -> dict[Target, Packer]:
    """Returns the packer of each target, after it has accepted all schemes of the recipe."""
    schemes: set[Scheme] = set()
    for step in config.recipe.values():
        if isinstance(step, MixedConfig):
            schemes |= set(step.schemes())
        elif step.quantizes:
            schemes.add(step.scheme())
    coded = layers if schemes else ()
    packers: dict[Target, Packer] = {}
    for target in config.targets:
        packers[target] = importlib.import_module(f"compression.targets.{target.value}")
        packers[target].check(schemes, "target")
        packers[target].check_parent(parent, coded, schemes, "target")
        if config.has_speed_budget:
            packers[target].check_layer_times("target")
    return packers


def _made_from(config: CompressionConfig, source: Source, samples: Samples) -> dict[str, Any]:
    """Returns everything that decides the result: a work folder of another result is emptied."""
    tokens = samples.calibration
    steps = {
        name: {"kind": type(step).__name__, **asdict(step)} for name, step in config.recipe.items()
    }
    return {
        "parent": source.digests,
        "steps": json.loads(json.dumps(steps, default=lambda enum: enum.value)),
        "layers": asdict(config.layers),
        "dtype": config.dtype.value,
        "scale_dtype": config.scale_dtype,
        "seed": config.seed,
        "calibration": {
            "data_digest": samples.digest,
            "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "num_samples": tokens.shape[0],
            "max_seq_len": tokens.shape[1],
        },
    }


@dataclass(frozen=True)
class _Evaluated:
    """Figures and logits of the result before it is packed, computed in float32.

    Attributes:
        quality: Comparison with the parent.
        logits: Logits of the first samples (N, T, V).
        parent: Parent to compare artifacts with.
    """

    quality: Quality
    logits: Tensor
    parent: Beside


def _evaluate(
    parent: Path,
    model: Path,
    result: Result,
    input_ids: Tensor,
    scratch: Path,
    stop_requested: Callable[[], bool],
) -> _Evaluated:
    # The child's blocks are read from the dense model, then overwritten by the compressed weights.
    streams = {"parent": BlockStream(parent), "child": BlockStream(model, result.put_into)}
    hidden = {}
    for name, stream in streams.items():
        folder = scratch / f"hidden-{name}"
        folder.mkdir()
        with progress.bar(f"evaluating the {name}") as shown:

            def advance(done: int, total: int, shown: progress.Advance = shown) -> None:
                shown(done, total)
                if stop_requested():
                    raise Interrupted("stopped while evaluating; the same command goes on")

            hidden[name] = final_hidden(stream, input_ids, folder, advance)
    before, after = (logits_of(streams[name], hidden[name]) for name in ("parent", "child"))
    quality = compare(before, after, input_ids)
    with torch.no_grad():
        first = next(hidden["child"].batches())[:_RELOADED]
        logits = streams["child"].logits(first)
    beside = Beside(parent, hidden["parent"], streams["parent"].wraps)
    return _Evaluated(quality, logits, beside)


def _least_db(target: Target, dtype: Dtype, schemes: Collection[Scheme]) -> float:
    """Returns the least signal-to-noise ratio that an artifact's logits must have, in dB."""
    if any(scheme.activation is not Activation.none for scheme in schemes):
        return _LEAST_DB_OF_ROUNDED_INPUTS
    # transformers loads a GGUF file as float32, in whatever type the rest is stored.
    return _LEAST_DB[Dtype.float32 if target is Target.gguf else dtype]


def _check_logits(target: Target, wanted: Tensor, found: Tensor, least_db: float) -> float:
    """Returns the signal-to-noise ratio of the artifact's logits to the result's, in dB.

    Raises:
        ReloadError: The logits differ too much to be of the same weights.
    """
    snr_db = signal_to_noise_db(wanted, found)
    if not snr_db >= least_db:  # written so that NaN is refused as well
        raise ReloadError(
            f"target={target.value}: loaded again, its logits are {snr_db:.1f} dB from those of "
            f"the compressed weights, below {least_db:.0f} dB; it was not kept"
        )
    return snr_db


def _lengths(settings: EvaluationConfig) -> dict[str, int]:
    return {"prompt_tokens": settings.prompt_tokens, "new_tokens": settings.new_tokens}


def _speeds(
    config: CompressionConfig, packer: Packer, parent: Path, artifact: Path
) -> dict[str, Speed]:
    settings = config.evaluation
    child = packer.runner(artifact) if settings.speed else None
    if child is None:
        return {}
    runners = {"parent": torch_runner(parent), "child": child}
    # Timed in float32 as well, the type in which a server without a GPU loads it.
    if child.dtype not in (None, "float32"):
        in_float32 = packer.runner(artifact, torch.float32)
        assert in_float32 is not None
        runners["child_float32"] = in_float32
    return measure(runners, settings.prompt_tokens, settings.new_tokens, settings.rounds)
