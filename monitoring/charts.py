"""Line charts as inline SVG that takes its colors from the page.

One drawing therefore suits both a light and a dark page.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from io import StringIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from monitoring.units import compact

MAX_POINTS = 2_000

# Placeholder colors, which are replaced by the page's CSS variables: matplotlib accepts colors
# only.
_INK, _GRID = "#000001", "#000002"
SERIES = ("#000003", "#000004", "#000005")
_VARIABLES = {
    _INK: "var(--chart-ink)",
    _GRID: "var(--chart-grid)",
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES, 1)},
}


@dataclass(frozen=True)
class Line:
    """Describes one line of a chart.

    Attributes:
        label: Name of the line in the legend.
        steps: Steps at which the value is known.
        values: Values at those steps; values that are not finite leave a gap.
        series: Number, from 1, of the series color of the page that the line has.
        faint: True draws the line as background to another one.
        dots: True marks the points.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    series: int = 1
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Describes a chart over steps.

    Attributes:
        title: Title of the chart.
        unit: Unit of the vertical axis.
        lines: Lines of the chart, at least one.
        show: Function that formats a value of the vertical axis.
        from_zero: True starts the vertical axis at 0.
        log_from: Smallest ratio of largest to smallest value for which the axis is logarithmic.
        marks: Steps at which the run was resumed.
    """

    title: str
    unit: str
    lines: list[Line]
    show: Callable[[float], str] = "{:g}".format
    from_zero: bool = False
    log_from: float = math.inf
    marks: list[int] = field(default_factory=list)


def thin(
    steps: Sequence[float], values: Sequence[float], limit: int = MAX_POINTS
) -> tuple[list[float], list[float]]:
    """Returns at most `limit` points, with the smallest and the largest of each interval.

    No spike is lost that way.

        Args:
            steps: Steps in ascending order.
            values: Values at those steps.
            limit: Largest number of points; an even number.
    """
    if len(steps) <= limit:
        return list(steps), list(values)
    kept: set[int] = set()
    y = np.asarray(values, dtype=float)
    for stretch in np.array_split(np.arange(len(y)), limit // 2):
        finite = stretch[np.isfinite(y[stretch])]
        if len(finite):
            kept |= {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])}
    return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def smooth(values: Sequence[float], half_width: int) -> list[float]:
    """Returns the mean of each value and its neighbors on both sides, which unlike a trailing mean
    does not lag.

    Args:
        values: Values to smooth; those that are not finite are skipped.
        half_width: Number of neighbors on each side. Near the start, where a loss falls fast, it
            shrinks on both sides; near the end, where a loss is flat, on the right side only.
    """
    y = np.asarray(values, dtype=float)
    finite = np.isfinite(y)
    # Prefix sums make each mean a difference of two entries, whatever the width.
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    i = np.arange(len(y))
    reach = np.minimum(half_width, i)
    low, high = i - reach, np.minimum(i + reach + 1, len(y))
    num = counts[high] - counts[low]
    means: list[float] = np.where(
        num > 0, (sums[high] - sums[low]) / np.maximum(num, 1), math.nan
    ).tolist()
    return means


def render(chart: Chart, width: float, height: float, prefix: str) -> str:
    """Returns the chart as one `<svg>` element.

    Args:
        chart: Chart to draw.
        width: Width in CSS pixels at natural size; the page may scale it.
        height: Height in CSS pixels at natural size.
        prefix: Prefix of every id in the element, unique in the page.
    """
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    axes = figure.add_subplot()
    for line in chart.lines:
        _draw(axes, line)
    for step in chart.marks:
        axes.axvline(step, color=_INK, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    _scale(axes, chart)
    _dress(axes, chart)
    return _inline(_svg(figure), chart, prefix)


def _draw(axes: Axes, line: Line) -> None:
    steps, values = thin(line.steps, line.values)
    axes.plot(
        steps,
        [v if math.isfinite(v) else math.nan for v in values],
        color=SERIES[line.series - 1],
        linewidth=0.8 if line.faint else 1.5,
        alpha=0.3 if line.faint else None,
        marker="o" if line.dots or len(steps) == 1 else None,
        markersize=3.5,
        solid_joinstyle="round",
        zorder=2 if line.faint else 3,
    )


def _scale(axes: Axes, chart: Chart) -> None:
    finite = [v for line in chart.lines for v in line.values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low > 0 and high / low >= chart.log_from:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        return
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if chart.from_zero:
        axes.set_ylim(0, high * 1.08 or 1)
    elif low == high:  # matplotlib would zoom into the rounding of a constant
        axes.set_ylim(low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9)


def _dress(axes: Axes, chart: Chart) -> None:
    axes.set_title(chart.unit, loc="left", fontsize=10, color=_INK, pad=8)
    axes.set_xlabel("step", loc="right", fontsize=10, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(compact(value))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(chart.show(value))))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=10, length=0, pad=6)
    axes.margins(x=0.015)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _tick(shown: str) -> str:
    """Returns a tick label without a trailing `.0`: `2k` for `2.0k`."""
    return re.sub(r"\.0(?=\D|$)", "", shown)


def _svg(figure: Figure) -> str:
    out = StringIO()
    # Text stays text in the page's font; matplotlib has no argument for it, only rc settings. A
    # fixed salt and no date make the same run give the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "spotforge"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def _inline(svg: str, chart: Chart, prefix: str) -> str:
    """Returns an SVG file as an element of the page, with unique ids and an accessible name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    # A tenth of a pixel is enough, and halves the size.
    svg = re.sub(r"(\d\.\d)\d+", r"\1", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    name = escape(describe(chart))
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1).replace(
        ">", f"><title>{name}</title>", 1
    )


def describe(chart: Chart) -> str:
    """Returns the chart as a sentence, for screen readers.

    Args:
        chart: Chart with at least one line.
    """
    parts = []
    for line in chart.lines:
        known = [(s, v) for s, v in zip(line.steps, line.values, strict=True) if math.isfinite(v)]
        if known and not line.faint:
            (first, start), (last, end) = known[0], known[-1]
            parts.append(
                f"{line.label} from {chart.show(start)} at step {first:.0f}"
                f" to {chart.show(end)} at step {last:.0f}"
            )
    return f"{chart.title} ({chart.unit}): {'; '.join(parts)}"
