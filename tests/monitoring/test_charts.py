import math
import re
from xml.etree import ElementTree

import matplotlib
import pytest

from monitoring.charts import MAX_POINTS, Chart, Line, render, smooth, thin


def test_thinning_keeps_spikes_and_order():
    values = [1.0] * 100_000
    values[31_415], values[77_777] = 99.0, -99.0
    steps, kept = thin(range(100_000), values)
    assert len(steps) <= MAX_POINTS
    assert steps == sorted(steps)
    assert (max(kept), min(kept)) == (99.0, -99.0)


def test_thinning_copes_with_stretches_that_are_not_finite():
    steps, kept = thin(range(10_000), [math.nan] * 5_000 + [2.0] * 5_000)
    assert kept and all(value == 2.0 for value in kept) and min(steps) >= 5_000


def test_smoothing_has_no_lag_on_a_slope():
    assert smooth([float(i) for i in range(10)], 3)[:7] == [0, 1, 2, 3, 4, 5, 6]


def test_smoothing_passes_over_what_is_not_finite():
    assert smooth([1.0, math.nan, 3.0], 1) == [1, 2, 3]
    assert math.isnan(smooth([math.nan], 1)[0])


@pytest.mark.parametrize(
    "values",
    [[3.0], [3.0, 3.0], [0.0, 0.0], [math.nan, 2.0], [1e-9, 1e9], [-1.0, 1.0], [math.inf, 1.0]],
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_renders_any_numbers(values, from_zero):
    line = Line("training", range(len(values)), values)
    svg = render(Chart("Loss", "nats", [line], from_zero=from_zero, log_from=8), 480, 250, "a")
    assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_svg_takes_colors_from_the_page_has_own_ids_and_a_name():
    svg = render(Chart("A < B", "nats", [Line("t", [1, 2], [3.0, 2.0])]), 480, 250, "p7")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "A < B (nats): t from 3 at step 1 to 2 at step 2"
    assert "var(--series-1)" in svg and "#0000" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids and all(i.startswith("p7-") for i in ids)
    assert all(i in ids for i in re.findall(r'(?:href="#|url\(#)([^")]*)', svg))


def test_global_settings_of_matplotlib_are_left_alone():
    before = dict(matplotlib.rcParams)
    render(Chart("Loss", "nats", [Line("t", [1], [1.0])]), 480, 250, "a")
    assert dict(matplotlib.rcParams) == before
