"""What a hint says suffices."""

import random

import pytest

from launch.rounding import rounded_up


@pytest.mark.parametrize(
    ("value", "said"), [(578.4701, "578.48"), (578.47, "578.47"), (0.0, "0.00"), (3.1, "3.10")]
)
def test_it_is_the_least_that_is_enough(value, said):
    assert rounded_up(value) == said


def test_it_is_never_too_little():
    rng = random.Random(0)
    for _ in range(10_000):
        value = 10 ** rng.uniform(-3, 6)
        assert value <= float(rounded_up(value)) < value + 0.01 + 1e-9
