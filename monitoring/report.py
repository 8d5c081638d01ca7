"""Writes a run's page `report.html`; run as `python -m monitoring.report runs/demo`."""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from core import layout
from core.errors import ConfigError
from core.folder import write_file
from core.settings.options import OptionParser
from monitoring.goodput import Goodput, goodput
from monitoring.run_charts import draw
from monitoring.run_files import Run, mapping, mappings, number, read_run
from monitoring.units import compact, duration, gibibytes, printable

# Limits on what is listed, so that the page stays below 2 MB for any run.
MAX_SAMPLE_STEPS = 5
MAX_SAMPLES_PER_STEP = 2
MAX_SAMPLE_CHARS = 1_500
MAX_FILES = 40
MAX_CHECKPOINTS = 20
MAX_LINKS = 20
MAX_VALUE_CHARS = 500

_STATUS = {
    "finished": "finished",
    "stopped": "stopped, can be resumed",
    "failed": "failed",
    "running": "running or killed",
}
# Parts of the run's time, with their labels in the bar and the table; the usually largest first.
_SPENT = {
    "useful_s": "training that counts",
    "starting_s": "starting",
    "saving_s": "waiting for saves",
    "evaluation_s": "evaluation",
    "lost_s": "repeated steps (estimated)",
    "ending_s": "ending: last evaluation, uploads, export",
    "waiting_s": "not running",
    "other_s": "other",
}
_PLACES = {
    layout.CONFIG: "resolved configuration",
    layout.ENVIRONMENT: "code, packages and hardware",
    layout.DATA: "data sources and their digests",
    layout.METRICS: "everything that was logged",
    layout.EVENTS: "starts, saves, stops and losses",
    layout.SUPERVISOR_EVENTS: "machines that joined, failed or were lost",
    layout.SAMPLES: "generated texts",
    layout.STATUS: "how the run ended",
    layout.CHECKPOINTS: "to resume from",
    layout.EXPORT: "Hugging Face model",
    "wandb": "Weights & Biases files",
}


@dataclass(frozen=True)
class Figure:
    """Holds one of the numbers at the top of the page."""

    label: str
    value: str
    note: str = ""


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run directory; call it after `MetricLogger.close`.

    Args:
        run_dir: Run directory, which has at least `metrics.jsonl`.

    Returns:
        Path of the page.

    Raises:
        ConfigError: `run_dir` has no `metrics.jsonl`.
        DamagedError: A JSON or YAML file of the run cannot be parsed.
    """
    run = read_run(run_dir)
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    path = run_dir / layout.REPORT
    write_file(path, page.render(_view(run)).encode(errors="replace"))
    return path


def _view(run: Run) -> dict[str, object]:
    return {
        "name": run.name,
        "status": run.status.get("status", "unknown"),
        "status_label": _STATUS.get(str(run.status.get("status")), "status unknown"),
        "subtitle": _subtitle(run),
        "figures": _figures(run),
        "notices": _notices(run),
        "drawings": draw(run),
        "goodput": _goodput(goodput(run)),
        "links": _links(run.supervisor_events),
        "samples": _samples(run),
        "config": _config_groups(run.config),
        "data": _data(run.data),
        "environment": _environment(run.environment),
        "checkpoints": [
            (c.name, gibibytes(c.size_bytes), c.latest)
            for c in reversed(run.checkpoints[-MAX_CHECKPOINTS:])
        ],
        "num_checkpoints": len(run.checkpoints),
        "places": [(n, role) for n, role in _PLACES.items() if (run.folder / n).exists()],
    }


# --- the top of the page


def _subtitle(run: Run) -> str:
    """Returns `5,000 of 5,000 steps on 1 x NVIDIA H200, torch 2.13`, as far as it is known."""
    parts = []
    if run.records:
        total = run.status.get("total_steps")
        of_total = f" of {total:,}" if isinstance(total, int) else ""
        parts.append(f"{run.records[-1]['step']:,}{of_total} steps")
    names = [str(g.get("name")) for g in mappings(run.environment.get("gpus"))]
    if names:
        parts.append(f"{len(names)} x {names[0]}")
    elif cpu := mapping(run.environment.get("cpu")):
        parts.append(f"{cpu.get('num_cores_usable')} cores of {cpu.get('model')}")
    return " on ".join(parts)


def _figures(run: Run) -> list[Figure]:
    figures = [
        _count_figure("parameters", number(run.status.get("num_parameters"))),
        _count_figure("tokens seen", _last(run, "num_tokens")),
        _time_figure(run),
        _loss_figure(run, "loss", "training loss", best=False),
        _loss_figure(run, "validation_loss", "validation loss", best=True),
        _loss_figure(run, "validation_bits_per_byte", "bits per byte", best=True),
        _rate_figure(run),
    ]
    return [figure for figure in figures if figure is not None]


def _last(run: Run, key: str) -> float | None:
    values = run.series(key)[1]
    return values[-1] if values else None


def _count_figure(label: str, value: float | None) -> Figure | None:
    return None if value is None else Figure(label, compact(value), f"{value:,.0f}")


def _time_figure(run: Run) -> Figure | None:
    elapsed_s = _last(run, "elapsed_s")
    if elapsed_s is None:
        return None
    num_resumes = len(run.resumes)
    note = f"{num_resumes} resume{'s' * (num_resumes > 1)}" if num_resumes else "uninterrupted"
    return Figure("training time", duration(elapsed_s), note)


def _loss_figure(run: Run, key: str, label: str, best: bool) -> Figure | None:
    steps, values = run.series(key)
    if not values:
        return None
    finite = [(v, s) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    note = f"at step {steps[-1]:,}"
    if best and finite and min(finite)[0] < values[-1]:
        note = f"best {min(finite)[0]:.4f} at {min(finite)[1]:,}"
    return Figure(label, f"{values[-1]:.4f}", note)


def _rate_figure(run: Run) -> Figure | None:
    rates = [v for v in run.series("tokens_per_s")[1] if math.isfinite(v)]
    if not rates:
        return None
    shares = [v for v in run.series("mfu")[1] if math.isfinite(v)]
    note = f"MFU {statistics.median(shares):.1%}" if shares else "median"
    return Figure("tokens/s", compact(statistics.median(rates)), note)


def _notices(run: Run) -> list[str]:
    notices = [] if run.records else ["Nothing has been logged yet."]
    for key in ("loss", "validation_loss", "grad_norm"):
        bad = [s for s, v in zip(*run.series(key), strict=True) if not math.isfinite(v)]
        if bad:
            notices.append(
                f"{key} was not finite at {len(bad)} logged step(s), first at step {bad[0]:,}."
            )
    return notices


# --- goodput


def _goodput(found: Goodput | None) -> dict[str, object]:
    """Returns the content of the section; empty for a run that took no time yet."""
    if found is None or found.wall_s <= 0:
        return {}
    parts = [(label, getattr(found, name)) for name, label in _SPENT.items()]
    facts = [
        _plural(found.num_starts, "start"),
        _plural(found.num_losses, "loss", "losses") + " without a final event",
        _plural(found.lost_steps, "step") + " repeated",
    ]
    if found.skipped_batches:
        facts.append(_plural(found.skipped_batches, "batch", "batches") + " skipped")
    return {
        # Rounded down, so that 100.0 % means that nothing was lost.
        "share": f"{math.floor(found.share * 1000) / 10:.1f} %",
        "wall": _exact_duration(found.wall_s),
        "spent": [
            (kind, label, _exact_duration(spent_s), spent_s / found.wall_s)
            for kind, (label, spent_s) in enumerate(parts, start=1)
            if spent_s >= 0.05  # anything less would read 0.0s
        ],
        "facts": ", ".join(facts),
    }


def _exact_duration(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 9.95 else duration(seconds)


def _plural(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


# --- links


def _links(events: Sequence[dict[str, object]]) -> list[tuple[str, str, str, str]]:
    """Returns slow links as the supervisor has last measured them, the slowest first."""
    speeds: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        measured = number(event.get("mbit_per_s"))
        others = number(event.get("others_mbit_per_s"))
        if event.get("event") == "slow" and measured is not None and others is not None:
            link = _excerpt(f"{event.get('source')} -> {event.get('target')}", MAX_VALUE_CHARS)
            speeds.setdefault(link, []).append((measured, others))
    slowest = sorted(speeds.items(), key=lambda item: item[1][-1])[:MAX_LINKS]
    return [
        (link, f"{found[-1][0]:.1f} Mbit/s", f"others {found[-1][1]:,.0f}", f"{len(found)} x")
        for link, found in slowest
    ]


# --- text


def _samples(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns generated texts of a few evenly spread steps, the last included."""
    by_step: dict[int, list[tuple[str, str]]] = {}
    for sample in run.samples:
        if isinstance(step := sample["step"], int):
            by_step.setdefault(step, []).append(
                (_excerpt(sample.get("prompt", "")), _excerpt(str(sample.get("text", "")).rstrip()))
            )
    return [(f"{s:,}", by_step[s][:MAX_SAMPLES_PER_STEP]) for s in reversed(_spread(list(by_step)))]


def _spread(steps: list[int]) -> list[int]:
    if len(steps) <= MAX_SAMPLE_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[round(i * last / (MAX_SAMPLE_STEPS - 1))] for i in range(MAX_SAMPLE_STEPS)]


def _excerpt(text: object, limit: int = MAX_SAMPLE_CHARS) -> str:
    shown = printable(str(text))
    return shown if len(shown) <= limit else shown[:limit] + " ..."


def _config_groups(config: dict[str, object]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns the settings by group in the file's order; settings without a group come first."""
    loose = {key: value for key, value in config.items() if not isinstance(value, dict)}
    groups = [("general", loose)] if loose else []
    groups += [(key, value) for key, value in config.items() if isinstance(value, dict)]
    return [(name, _flat(group)) for name, group in groups]


def _flat(tree: dict[str, object], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value)
            rows.append((f"{prefix}{key}", _excerpt(shown, MAX_VALUE_CHARS)))
    return rows


def _data(data: dict[str, object]) -> dict[str, object]:
    return {
        "digest": str(data.get("digest") or ""),
        "facts": [(k, _fact(k, v)) for k, v in data.items() if isinstance(v, int | float | str)],
        "sources": [_source(source) for source in mappings(data.get("sources"))],
    }


def _source(source: dict[str, object]) -> dict[str, object]:
    files = mappings(source.get("files"))
    train = mapping(mapping(source.get("splits")).get("train"))
    num_tokens = number(train.get("num_tokens", source.get("num_tokens")))
    return {
        "name": str(source.get("name") or source.get("path") or source.get("kind") or "source"),
        "kind": str(source.get("kind") or ""),
        "num_files": len(files),
        "size": gibibytes(sum(number(f.get("size_bytes")) or 0 for f in files)) if files else "",
        "num_tokens": "" if num_tokens is None else compact(num_tokens),
        "files": [(str(f.get("path")), str(f.get("sha256") or "")) for f in files[:MAX_FILES]],
        "num_more": max(len(files) - MAX_FILES, 0),
    }


def _fact(key: str, value: float | int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _environment(environment: dict[str, object]) -> list[tuple[str, str]]:
    cpu, git = mapping(environment.get("cpu")), mapping(environment.get("git"))
    gpus = mappings(environment.get("gpus"))
    memory = number(environment.get("memory_bytes"))
    packages = mapping(environment.get("packages"))
    rows = [
        ("commit", f"{git['commit']}{' + changes' if git.get('dirty') else ''}" if git else ""),
        ("GPUs", ", ".join(f"{g.get('name')} ({_memory(g)})" for g in gpus)),
        ("CUDA", str(environment.get("cuda") or "")),
        ("CPU", f"{cpu.get('model')}, {cpu.get('num_cores')} cores" if cpu else ""),
        ("memory", gibibytes(memory) if memory else ""),
        ("platform", str(environment.get("platform") or "")),
        ("Python", str(environment.get("python") or "")),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
    ]
    return [(label, value) for label, value in rows if value]


def _memory(gpu: dict[str, object]) -> str:
    return gibibytes(number(gpu.get("memory_bytes")) or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments to parse; None takes those of the process.

    Returns:
        Exit code of the process.
    """
    parser = OptionParser(prog="python -m monitoring.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run, e.g. runs/demo")
    try:
        print(write_report(parser.parse_args(argv).run_dir))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
