"""The shapes of the learning-rate schedules, at the steps where an off-by-one would show."""

import math
from itertools import pairwise

import pytest

from core.errors import ConfigError
from trainer.schedule import ConstantConfig, CosineConfig, WarmupStableDecayConfig

TOTAL = 50
SCHEDULES = {
    "cosine": CosineConfig(warmup_steps=5, min_lr_ratio=0.1),
    "wsd": WarmupStableDecayConfig(warmup_steps=5, decay_steps=20, min_lr_ratio=0.1),
    "constant": ConstantConfig(warmup_steps=5),
}


def curve(schedule, total=TOTAL):
    return [schedule.scale(step, total) for step in range(total)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear_and_never_zero(name):
    scales = curve(SCHEDULES[name])
    assert scales[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert scales[5] == 1.0, "the first step after warm-up is at the peak"
    assert max(scales) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_step_is_at_the_peak(name):
    schedule = type(SCHEDULES[name])(warmup_steps=0)
    assert schedule.scale(0, 200) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_never_rises_after_warmup(name):
    assert all(later <= earlier for earlier, later in pairwise(curve(SCHEDULES[name])[4:]))


def test_cosine():
    scales = curve(SCHEDULES["cosine"])
    assert scales[-1] == pytest.approx(0.1), "the last step is at min_lr_ratio"
    assert all(later < earlier for earlier, later in pairwise(scales[5:]))
    middle = CosineConfig(warmup_steps=0, min_lr_ratio=0.2)
    assert middle.scale(50, 101) == pytest.approx(0.6), "half-way down after half of the steps"
    assert middle.scale(25, 101) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))


def test_cosine_of_zero_ends_at_zero():
    assert CosineConfig(warmup_steps=2, min_lr_ratio=0.0).scale(9, 10) == pytest.approx(0, abs=1e-9)


def test_wsd():
    scales = curve(SCHEDULES["wsd"])
    # 50 steps: 5 up, then the peak until 20 steps are left to go down in.
    assert scales[4:30] == [1.0] * 26
    assert scales[30] < 1.0
    assert scales[-1] == pytest.approx(0.1)
    falls = [earlier - later for earlier, later in pairwise(scales[29:])]
    assert falls == pytest.approx([0.9 / 20] * 20), "the decay is linear"


def test_wsd_can_be_extended_before_the_decay():
    wsd = SCHEDULES["wsd"]
    assert curve(wsd, 50)[:30] == curve(wsd, 80)[:30]


def test_constant_needs_no_length():
    constant = SCHEDULES["constant"]
    assert [constant.scale(step, None) for step in (0, 4, 5, 10**6)] == [0.2, 1.0, 1.0, 1.0]
    assert constant.check(None) is None
    assert constant.check(3) is None, "the run may end during warm-up"


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_a_shape_that_depends_on_the_length_refuses_the_clock(name):
    with pytest.raises(ConfigError, match=f"schedule={name}.*schedule=constant"):
        SCHEDULES[name].check(None)


@pytest.mark.parametrize(("name", "needed"), [("cosine", 5), ("wsd", 25)])
def test_warmup_and_decay_must_fit(name, needed):
    schedule = SCHEDULES[name]
    assert schedule.check(needed + 1) == needed + 1
    for total in (needed, needed - 1, 1):
        with pytest.raises(ConfigError, match=f"shorter than the run of {total} steps"):
            schedule.check(total)
