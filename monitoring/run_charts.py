"""Selects the charts that the report draws of a run."""

import math
from dataclasses import dataclass, replace

from monitoring.charts import Chart, Line, render, smooth
from monitoring.run_files import Run
from monitoring.units import compact


@dataclass(frozen=True)
class Drawing:
    """Holds a drawn chart; a wide one has a narrow version for small screens.

    Attributes:
        chart: Chart that is drawn.
        svg: Element to show.
        narrow: Element that replaces a wide one on a small screen; empty if there is no wide one.
    """

    chart: Chart
    svg: str
    narrow: str = ""


def draw(run: Run) -> list[Drawing]:
    """Returns the charts of all logged keys, in the order of the page.

    Two charts share a row; the loss has a row of its own, and so has a last one without a neighbor.

    Args:
        run: Run to draw; keys that were never logged are left out.
    """
    loss = _loss_chart(run)
    small = [chart for chart in _small_charts(run) if chart.lines]
    alone = len(small) - 1 if len(small) % 2 else None
    drawings = [_draw(loss, 340, "loss")] if loss.lines else []
    for i, chart in enumerate(small):
        drawings.append(_draw(chart, 250 if i == alone else None, f"chart{i}"))
    return drawings


def _draw(chart: Chart, wide_height: float | None, prefix: str) -> Drawing:
    svg = render(chart, 480, 250, prefix)
    if wide_height is None:
        return Drawing(chart, svg)
    return Drawing(chart, render(chart, 980, wide_height, f"{prefix}w"), svg)


def _loss_chart(run: Run) -> Chart:
    lines = _noisy(run, "loss", "training", smooth_from=150)
    lines += _line(run, "validation_loss", "validation", 2, dots=True)
    return Chart("Loss", "nats per token", lines, "{:.3g}".format, log_from=8, marks=run.resumes)


def _small_charts(run: Run) -> list[Chart]:
    short, exact = "{:.3g}".format, "{:.4g}".format
    bits = _line(run, "validation_bits_per_byte", "validation", 2, dots=True)
    rate = _noisy(run, "tokens_per_s", "tokens/s")
    lr = _line(run, "lr", "learning rate")
    norm = _noisy(run, "grad_norm", "gradient norm")
    time = _noisy(run, "step_s", "step")
    time += _noisy(run, "data_wait_s", "waiting for data, included in it", 2)
    time += _line(run, "checkpoint_blocking_s", "saving, in addition", 3, dots=True)
    memory = _line(run, "peak_memory_bytes", "memory", scale=2**-30)
    mfu = _noisy(run, "mfu", "MFU", scale=100)
    return [
        Chart("Validation bits per byte", "bits per byte", bits, exact),
        Chart("Throughput", "tokens/s", rate, compact, from_zero=True),
        Chart("Learning rate", "per step", lr, _scientific, from_zero=True),
        Chart("Gradient norm", "before clipping", norm, log_from=20),
        Chart("Step time", "seconds", time, short, from_zero=True),
        Chart("Peak memory", "GiB", memory, short, from_zero=True),
        Chart("Model FLOPs utilization", "% of peak", mfu, short, from_zero=True),
    ]


def _noisy(
    run: Run, key: str, label: str, series: int = 1, scale: float = 1, smooth_from: int = 1_000
) -> list[Line]:
    """Returns `_line`, and for a long series the faint line with its running mean in front."""
    lines = _line(run, key, label, series, scale=scale)
    if not lines or len(lines[0].steps) < smooth_from:
        return lines
    (raw,) = lines
    mean = smooth(raw.values, len(raw.values) // 80)
    return [replace(raw, faint=True), replace(raw, label=f"{label}, mean", values=mean)]


def _line(
    run: Run, key: str, label: str, series: int = 1, dots: bool = False, scale: float = 1
) -> list[Line]:
    """Returns the line of a key; an empty list if no finite value was logged."""
    steps, values = run.series(key)
    if not any(math.isfinite(v) for v in values):
        return []
    return [Line(label, steps, [v * scale for v in values], series, dots=dots and len(steps) <= 60)]


def _scientific(value: float) -> str:
    """Returns a number as `3e-4`."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    return f"{round(value / 10**exponent, 2):g}e{exponent}"
