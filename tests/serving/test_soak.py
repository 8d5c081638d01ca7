"""A minute of the soak that `make soak` runs for an hour."""

import asyncio

import pytest

from tests.serving import soak


@pytest.mark.long
def test_a_minute_at_capacity_loses_nothing_and_leaves_nothing(export):
    process = soak.start(export, "engine.num_threads=1")
    try:
        outcome = asyncio.run(soak.soak(process, 60, seed=0))
    finally:
        assert process.stop() == 0
    assert outcome.wrong == []
    assert sum(outcome.counts.values()) > 100 and len(outcome.counts) == 6
