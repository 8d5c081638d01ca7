"""recipe=auto: likely recipes are made and measured on this machine; the fastest good one stays.

Nothing that is slower than the parent is ever picked; of what could not be tried, why is said.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compression.artifact import AUTO, CANDIDATES, check_replaceable, places, read_report
from compression.config import CompressionConfig, Target
from compression.gate import GateError
from compression.recipe import AutoConfig, GptqConfig, RoundConfig, Step
from compression.run import run
from compression.source import choose_layers
from compression.stream import BlockStream
from compression.targets.openvino_program import PYTHON
from core.errors import ConfigError
from core.settings.rules import check_settings

_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class _Candidate:
    """A recipe of one step, and its target."""

    name: str
    step: Step
    target: Target


@dataclass(frozen=True)
class _Tried:
    """What became of a candidate: its report, or why there is none."""

    candidate: _Candidate
    report: dict[str, Any] | None
    reason: str


def run_auto(config: CompressionConfig, stop_requested: Callable[[], bool]) -> Path | None:
    """Tries the candidates for `target=cpu`; the folder of the one that is kept, or None.

    Leaves `auto.json` with what was measured.

    Raises:
        ConfigError: The settings, the parent or the data do not allow any candidate.
        Interrupted: Told to stop; the same command goes on.
    """
    step: AutoConfig = config.recipe["auto"]
    check_settings(config)
    assert not config.targets  # else it is refused there
    parent, out = places(config)
    check_replaceable(out, None, parent)
    tried = []
    for candidate in _candidates(config, parent):
        place = out / CANDIDATES / f"{candidate.name}-{candidate.target.value}"
        tried.append(_try(config, candidate, place, stop_requested))
    good = [t for t in tried if t.report is not None and not _why_not(t.report, step)]
    # By what it is over the parent, which was timed in turn with it: the machine may be noisy.
    best = max(good, key=lambda t: _speed(t, "child") / _speed(t, "parent"), default=None)
    kept = None
    if best is not None:
        kept = out / best.candidate.target.value
        shutil.rmtree(kept, ignore_errors=True)
        name = f"{best.candidate.name}-{best.candidate.target.value}"
        (out / CANDIDATES / name / best.candidate.target.value).rename(kept)
    out.mkdir(parents=True, exist_ok=True)
    found = [{**_named(t), "why_not": _why(t, step), "report": t.report} for t in tried]
    told = {"picked": None if best is None else _named(best), "candidates": found}
    (out / AUTO).write_text(json.dumps(told, indent=1) + "\n")
    shutil.rmtree(out / CANDIDATES, ignore_errors=True)
    _show(tried, step, best, kept)
    return kept


def _candidates(config: CompressionConfig, parent: Path) -> list[_Candidate]:
    stream = BlockStream(parent)
    layers = choose_layers(stream, config.layers.include, config.layers.exclude)
    widths = {layer.in_features for layer in stream.chosen(layers).values()}
    candidates = [_Candidate("int8_weight_only", RoundConfig(), Target.openvino)]
    sizes = [size for size in _GROUP_SIZES if not any(width % size for width in widths)]
    if sizes:
        int4 = GptqConfig(group_size=sizes[0])
        candidates.append(_Candidate("int4_gptq", int4, Target.openvino))
    candidates.append(_Candidate("int8_weight_only", RoundConfig(), Target.torchao))
    return candidates


def _try(
    config: CompressionConfig,
    candidate: _Candidate,
    place: Path,
    stop_requested: Callable[[], bool],
) -> _Tried:
    artifact = place / candidate.target.value
    if not artifact.is_dir():  # else it was made before a stop
        of_candidate = replace(
            config,
            recipe={candidate.name: candidate.step},
            target=candidate.target.value,
            out=str(place),
            evaluation=replace(config.evaluation, speed=True),
        )
        try:
            run(of_candidate, stop_requested)
        except ConfigError as e:
            if e.key not in ("target", PYTHON):
                raise  # of the parent or the data: it would be the same for all
            return _Tried(candidate, None, str(e))
        except GateError as e:
            return _Tried(candidate, None, e.failed)
    return _Tried(candidate, read_report(artifact), "")


def _speed(tried: _Tried, which: str) -> float:
    assert tried.report is not None
    speed: float = tried.report["speed"][which]["decode_tokens_per_s"]
    return speed


def _why_not(report: dict[str, Any], step: AutoConfig) -> str:
    """Why a candidate is not to be picked; nothing where it may be."""
    parent, child = (report["speed"][which]["decode_tokens_per_s"] for which in ("parent", "child"))
    ratio = report["evaluation"]["perplexity_ratio"]["mean"]
    if child <= parent:
        return f"not faster than the parent ({child / parent:.2f} x)"
    if ratio > step.max_perplexity_ratio:
        return f"perplexity {ratio:.4f} x, above {step.max_perplexity_ratio}"
    return ""


def _why(tried: _Tried, step: AutoConfig) -> str:
    return tried.reason if tried.report is None else _why_not(tried.report, step)


def _named(tried: _Tried) -> dict[str, str]:
    return {"recipe": tried.candidate.name, "target": tried.candidate.target.value}


def _show(tried: list[_Tried], step: AutoConfig, best: _Tried | None, kept: Path | None) -> None:
    title = "recipe=auto, decode on this machine, each beside the parent"
    table = Table(title=title, title_justify="left")
    for column in ("recipe", "target", "tokens/s", "x parent", "perplexity"):
        table.add_column(column)
    for one in tried:
        figures = ["", "", ""]
        if one.report is not None:
            child, parent = _speed(one, "child"), _speed(one, "parent")
            ratio = one.report["evaluation"]["perplexity_ratio"]["mean"]
            figures = [f"{child:.1f}", f"{child / parent:.2f}", f"{ratio:.4f} x"]
        table.add_row(*_named(one).values(), *figures)
    console = Console()
    console.print(table)
    # Beside the table, since a narrow one would cut the names of what is missing.
    for one in tried:
        said = (
            "picked" if one is best else _why(one, step) or "not as many times the parent's speed"
        )
        console.print(f"{' '.join(_named(one).values())}: {said}", soft_wrap=True)
    if kept is not None:
        console.print(f"{kept}", soft_wrap=True)
    else:
        console.print("none is faster than the parent and good enough: keep the parent")
