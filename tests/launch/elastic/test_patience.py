"""The limit for a hang follows the usual silence, phase by phase."""

import pytest

from launch.elastic.patience import Patience
from launch.elastic.protocol import RankStatus


class Clock:
    """Beats of two ranks, as a supervisor sees them."""

    def __init__(self, patience):
        self.patience, self.now = patience, 100.0

    def beat(self, phase, step, after_s):
        self.now += after_s
        ranks = [RankStatus(0, phase, step, self.now), RankStatus(1, phase, step, self.now - 0.01)]
        self.patience.observe(ranks)

    def steps(self, first, last, each_s):
        for step in range(first, last + 1):
            self.beat("train", step, each_s)


@pytest.fixture
def patience():
    return Patience(cap_s=600)


def test_before_twenty_steps_the_cap_holds(patience):
    Clock(patience).steps(0, 19, 5.0)
    assert patience.limit_s == 600


def test_after_twenty_steps_it_is_ten_times_the_slowest_usual_step(patience):
    clock = Clock(patience)
    clock.steps(0, 20, 5.0)
    assert patience.limit_s == pytest.approx(50)
    clock.beat("train", 21, 9.0)
    assert patience.limit_s == pytest.approx(90)
    clock.steps(22, 200, 5.0)  # a slow one long ago is not usual
    assert patience.limit_s == pytest.approx(50)


def test_steps_that_compile_do_not_count(patience):
    clock = Clock(patience)
    clock.beat("train", 0, 1.0)
    clock.steps(1, 3, 300.0)
    clock.steps(4, 25, 5.0)
    assert patience.limit_s == pytest.approx(50)


@pytest.mark.parametrize(("each_s", "limit_s"), [(0.05, 20), (1.9, 20), (2.1, 21), (70, 600)])
def test_it_is_at_least_twenty_seconds_and_at_most_the_cap(patience, each_s, limit_s):
    Clock(patience).steps(0, 30, each_s)
    assert patience.limit_s == pytest.approx(limit_s)


def test_saves_and_evaluations_have_their_own_times(patience):
    clock = Clock(patience)
    clock.steps(0, 30, 3.0)
    clock.beat("save", 30, 3.0)
    assert patience.limit_s == 600  # none is known yet
    clock.beat("evaluate", 30, 40.0)
    assert patience.limit_s == 600
    clock.beat("evaluate", 30, 2.5)  # batch by batch
    assert patience.limit_s == pytest.approx(25)
    clock.beat("train", 31, 2.5)
    assert patience.limit_s == pytest.approx(30)
    clock.beat("save", 31, 3.0)
    assert patience.limit_s == pytest.approx(400)


def test_another_start_learns_anew(patience):
    """Half of the ranks take twice as long for a step."""
    Clock(patience).steps(0, 30, 3.0)
    patience.begin()
    clock = Clock(patience)
    assert patience.limit_s == 600
    clock.steps(31, 51, 6.0)
    assert patience.limit_s == pytest.approx(60)


def test_after_a_hang_it_waits_longer(patience):
    """It may have been a stall, which comes again."""
    patience.relax()
    patience.begin()
    Clock(patience).steps(0, 30, 0.1)
    assert patience.limit_s == pytest.approx(40)
    patience.relax()
    patience.begin()
    Clock(patience).steps(0, 30, 3.0)
    assert patience.limit_s == pytest.approx(120)


def test_a_small_cap_stays(patience):
    patience = Patience(cap_s=3)
    Clock(patience).steps(0, 30, 1.0)
    assert patience.limit_s == 3
