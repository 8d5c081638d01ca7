"""When to save: what a save costs against what a lost machine loses."""

import math

import pytest

from core.errors import ConfigError
from trainer.interval import Interval, SaveSchedule, expected_mtbf_s, optimal_interval


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("auto", Interval(auto=True)),
        ("end", Interval()),
        ("500", Interval(steps=500)),
        ("90s", Interval(seconds=90)),
        ("10min", Interval(seconds=600)),
        ("1.5h", Interval(seconds=5400)),
    ],
)
def test_what_can_be_said(text, interval):
    assert Interval.parse(text) == interval


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "1.5", "often", "10m", "5 min", "auto10"])
def test_what_cannot(text):
    with pytest.raises(ConfigError, match=r"checkpoint\.interval=.*auto, 500, 90s"):
        Interval.parse(text)


@pytest.mark.parametrize("cost_s", [0.1, 2.0, 60.0])
@pytest.mark.parametrize("mtbf_s", [600.0, 6 * 3600.0])
def test_no_other_interval_loses_less(cost_s, mtbf_s):
    """Daly's own cost model: time to do one second of work, with losses of an exponential law."""

    def wall_s(interval_s):
        pieces = 1 / interval_s
        return mtbf_s * (math.exp((interval_s + cost_s) / mtbf_s) - 1) * pieces

    best = optimal_interval(cost_s, mtbf_s)
    for other in (0.7, 0.9, 1.1, 1.4):
        assert wall_s(best) <= wall_s(best * other) * (1 + 1e-4)
    assert best == pytest.approx(math.sqrt(2 * cost_s * mtbf_s), rel=0.25)  # Young's


def test_a_save_that_costs_more_than_it_saves_is_rare():
    assert optimal_interval(cost=100, mtbf=30) == 30


def test_what_was_expected_gives_way_to_what_is_seen():
    hour = 3600.0
    assert expected_mtbf_s(6 * hour, 0, 0) == 6 * hour
    assert expected_mtbf_s(6 * hour, 10 * hour, 19) == 16 * hour / 20
    assert expected_mtbf_s(6 * hour, 600 * hour, 99) == pytest.approx(6 * hour, rel=0.02)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def due_times(schedule, clock, cost_s, until_s):
    times = []
    while clock.now < until_s:
        clock.now += 1
        if schedule.due(step=int(clock.now)):
            times.append(clock.now)
            clock.now += cost_s
            schedule.saved(cost_s)
    return times


def test_auto_follows_the_measured_cost():
    clock = Clock()
    schedule = SaveSchedule(Interval(auto=True), mtbf_s=6 * 3600.0, clock=clock)
    cheap = due_times(schedule, clock, cost_s=0.5, until_s=2000)
    assert cheap[0] == 60, "nothing is measured yet"
    assert cheap[2] - cheap[1] == pytest.approx(optimal_interval(0.5, 6 * 3600), abs=2)
    dear = due_times(schedule, clock, cost_s=50.0, until_s=30_000)
    assert dear[-1] - dear[-2] > 5 * (cheap[2] - cheap[1])


def test_auto_remembers_what_saves_cost_before_a_restart():
    clock = Clock()
    schedule = SaveSchedule(Interval(auto=True), 3600.0, [9.0, 0.1, 0.1, 0.1, 0.1, 0.1], clock)
    first = due_times(schedule, clock, cost_s=0.1, until_s=60)[0]
    assert first == pytest.approx(optimal_interval(0.1, 3600), abs=1)


def test_auto_saves_more_often_where_machines_vanish_more_often():
    clock = Clock()
    schedule = SaveSchedule(Interval(auto=True), mtbf_s=60.0, clock=clock)
    times = due_times(schedule, clock, cost_s=0.5, until_s=100)
    assert times[0] == 30 and times[2] - times[1] < 10


def test_steps_and_seconds():
    clock = Clock()
    steps = SaveSchedule(Interval(steps=3), mtbf_s=1.0, clock=clock)
    assert [step for step in range(1, 10) if steps.due(step)] == [3, 6, 9]
    seconds = SaveSchedule(Interval(seconds=7), mtbf_s=1.0, clock=clock)
    assert due_times(seconds, clock, cost_s=0, until_s=21) == [7, 14, 21]
    assert not any(SaveSchedule(Interval(), 1.0).due(step) for step in range(1000))
