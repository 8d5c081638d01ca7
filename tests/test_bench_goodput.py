"""The arithmetic of the goodput benchmark; the replay itself takes minutes and real processes."""

import json

import pytest

from benchmarks.availability import Trace
from benchmarks.bench_goodput import _count_samples


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "zone.json"
    nodes = [0, 4, 4, 3, 1, 0, 0, 1, 2, 4, 4, 4]
    path.write_text(json.dumps({"metadata": {"gap_seconds": 1800}, "data": nodes}))
    return Trace.read(path, max_nodes=2)


def test_no_more_nodes_than_asked_for(trace):
    assert trace.nodes == [0, 2, 2, 2, 1, 0, 0, 1, 2, 2, 2, 2]
    assert trace.losses_per_hour == pytest.approx(2 / 6)


def test_the_window_is_a_typical_one(trace):
    # In 2.5 hours (5 points) the trace loses 0.83 nodes, so one: from points 1 to 5 it loses 2.
    first = trace.typical_window(2.5)
    window = trace.nodes[first : first + 5]
    assert window[0] > 0 and window == [1, 0, 0, 1, 2]
    assert trace.changes(first, 2.5) == [(0.0, 1), (1800.0, 0), (5400.0, 1), (7200.0, 2)]


def test_a_trace_without_a_node_is_refused(tmp_path):
    path = tmp_path / "zone.json"
    path.write_text(json.dumps({"metadata": {"gap_seconds": 60}, "data": [0] * 100}))
    with pytest.raises(SystemExit, match="no window"):
        Trace.read(path, max_nodes=2).typical_window(1.0)


def row(gang, step, *samples):
    return {"gang": gang, "step": step, "samples": list(samples)}


@pytest.mark.parametrize(
    ("rows", "repeated", "skipped"),
    [
        ([row("a", 1, 0, 1), row("a", 1, 2, 3), row("a", 2, 4, 5), row("a", 2, 6, 7)], 0, 0),
        ([row("a", 1, 0, 1), row("b", 1, 0, 1, 2, 3), row("b", 2, 4, 5, 6, 7)], 0, 0),
        ([row("a", 1, 0, 1), row("a", 1, 2, 3), row("b", 2, 3, 4, 5, 6)], 1, 0),
        ([row("a", 1, 0, 1), row("a", 1, 2, 3), row("b", 2, 5, 6, 7)], 0, 1),
        ([row("a", 1, 0, 1, 2, 3), row("a", 2, 4, 5, 6, 7), row("a", 3, 8)], 0, 0),
    ],
)
def test_samples_of_the_steps_that_count(rows, repeated, skipped):
    assert _count_samples(rows, num_steps=2) == (repeated, skipped)
