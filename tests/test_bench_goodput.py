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
    assert trace.changes_per_hour == pytest.approx((2 + 2 + 2) / 6)


def test_the_window_is_a_typical_one(trace):
    # 1.5 of them in 3 points: those from 2, 3, 4 and 7 see one or two.
    assert trace.typical_window(1.5) == 4
    assert trace.changes(2, 1.5) == [(0.0, 2), (3600.0, 1)]
    assert trace.changes(4, 2.5) == [(0.0, 1), (1800.0, 0), (5400.0, 1), (7200.0, 2)]


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
