"""A machine whose clock is wrong tells the time of its supervisor."""

import time

import pytest

from core import clock


def test_without_a_supervisor_it_is_the_machine_s_own(monkeypatch):
    monkeypatch.delenv(clock.VARIABLE, raising=False)
    assert clock.now() == pytest.approx(time.time(), abs=60)


def test_it_goes_on_from_what_the_supervisor_told_whatever_the_machine_says(monkeypatch):
    monotonic_s, wall_s = [50.0], [9e9]
    monkeypatch.setattr(clock.time, "monotonic", lambda: monotonic_s[0])
    monkeypatch.setattr(clock.time, "time", lambda: wall_s[0])
    for name, value in clock.variable_of(1.7e9).items():
        monkeypatch.setenv(name, value)
    assert clock.now() == pytest.approx(1.7e9)
    monotonic_s[0], wall_s[0] = 60.0, 1e9  # somebody sets the clock meanwhile
    assert clock.now() == pytest.approx(1.7e9 + 10)
