"""Decisions that need no process."""

import pytest

from launch.elastic.policy import (
    History,
    behind,
    choose_nodes,
    failure_of,
    highest_step,
    root_cause,
)
from launch.elastic.protocol import RankStatus


@pytest.mark.parametrize(
    ("nprocs", "multiple_of", "chosen"),
    [
        ([8, 8, 8], 1, [0, 1, 2]),
        ([8, 8, 8], 16, [0, 1]),
        ([4, 8, 4], 8, [0, 1, 2]),
        ([4, 8], 8, [1]),
        ([7, 8, 8], 8, [1, 2]),
        ([3, 5, 8, 2], 8, [0, 1, 2]),
        ([0, 2, 0], 2, [1]),
        ([7], 8, []),
        ([], 1, []),
    ],
)
def test_the_largest_gang_of_whole_nodes(nprocs, multiple_of, chosen):
    assert choose_nodes(nprocs, multiple_of) == chosen


def test_many_nodes_are_chosen_from_at_once():
    assert sum([7] * len(choose_nodes([7] * 500, 64))) == 7 * 448


def test_a_killed_rank_is_the_cause_of_errors():
    ranks = [
        RankStatus(0, exit=1, ended_at=1.0, error="ConnectionResetError: by peer"),
        RankStatus(1, exit=-9, ended_at=2.0),
        RankStatus(2),
    ]
    assert root_cause(ranks) is ranks[1]


def test_the_earliest_error_is_the_cause_of_the_others():
    ranks = [
        RankStatus(0, exit=33, ended_at=0.1),
        RankStatus(1, exit=1, ended_at=0.5),  # said nothing: was it the cause, it had an error
        RankStatus(2, exit=1, ended_at=2.0, error="RuntimeError: lost a peer"),
        RankStatus(3, exit=1, ended_at=1.0, error="ValueError: bad"),
    ]
    assert root_cause(ranks) is ranks[3]
    assert root_cause([ranks[0], RankStatus(1)]) is None


def test_the_rank_behind_is_at_the_lowest_step_then_longest_silent():
    ranks = [
        RankStatus(0, "train", 12, beat_at=1.0),
        RankStatus(1, "train", 11, beat_at=9.0),
        RankStatus(2, "train", 11, beat_at=8.0),
        RankStatus(3),
    ]
    assert behind(ranks) is ranks[2]
    assert highest_step(ranks) == 12
    assert highest_step([RankStatus(0, "data", 0), RankStatus(1, "starting", 0)]) is None
    assert highest_step([RankStatus(0, "train", 0)]) == 0


def test_failures_are_the_same_but_for_numbers_and_addresses():
    def failure(error, step=12, phase="train"):
        return failure_of(RankStatus(1, phase, step, exit=1, error=error))

    first = failure("Traceback:\n  ...\nValueError: 17 at 0x7f3a is bad\n")
    assert first.error == failure("ValueError: 4 at 0xAB12 is bad").error
    assert first.error != failure("ValueError: 4 at 0xAB12 is worse").error
    assert first.text == (
        "rank 1 failed with exit code 1 at step 12: ValueError: 17 at 0x7f3a is bad"
    )
    assert failure("E", 0, "starting").text.endswith("exit code 1 before its first step: E")
    assert failure_of(RankStatus(0, exit=-11)).text == "rank 0 died of SIGSEGV"


def test_the_same_failure_at_the_same_step_three_times_is_a_loop():
    history = History()
    for _ in range(3):
        assert history.crash_loop() is None
        history.reached(12)
        history.failed("ValueError", 12)
    assert history.crash_loop() == "the same error 3 times at step 12"


def test_progress_clears_what_was_before():
    history = History()
    for step in (12, 12, 13, 13):
        history.reached(step)
        history.failed("ValueError", step)
    history.reached(11)  # from an earlier checkpoint: no progress
    history.failed("ValueError", 11)
    assert (history.num_failures, history.step) == (3, 13)
    assert history.crash_loop() is None


def test_ten_different_failures_in_a_row_are_a_loop():
    history = History()
    for number in range(10):
        assert history.crash_loop() is None
        history.failed(f"error {number}", None)
    assert history.crash_loop() == "10 failures in a row without progress"


def test_the_wait_doubles_up_to_a_minute(monkeypatch):
    monkeypatch.setattr("launch.elastic.policy.random.uniform", lambda low, high: high)
    history = History()
    waits = []
    for _ in range(9):
        history.failed("ValueError", None)
        waits.append(history.backoff_s() / 1.5)
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    monkeypatch.setattr("launch.elastic.policy.random.uniform", lambda low, high: low)
    assert history.backoff_s() == 30
    history.reached(1)
    history.failed("ValueError", 1)
    assert history.backoff_s() == 0.25
