"""The formulas against a job that is played through, interruption by interruption."""

import math
import random
import statistics

import pytest

from launch.plan.interruptions import Interruptions, duration
from trainer.interval import optimal_interval

PLAYED = 1500


def play(rng, compute_h, model):
    """One job: hours until done, hours paid, interruptions."""
    wall_h = paid_h = saved_h = progress_h = 0.0
    losses = 0
    to_next = rng.expovariate(model.per_h)

    def pay(hours):
        nonlocal wall_h, paid_h, to_next, losses
        survived = to_next > hours
        used = hours if survived else to_next
        wall_h, paid_h = wall_h + used, paid_h + used
        to_next -= used
        if not survived:
            to_next = rng.expovariate(model.per_h)
            losses += 1
            wall_h += rng.expovariate(1 / model.wait_h)
        return survived

    while not pay(model.restart_h):
        pass
    pending_h = None  # a save that is not complete yet
    while progress_h < compute_h - 1e-12:
        segment_h = min(model.interval_h, compute_h - progress_h)
        writing_h = 0.0 if pending_h is None else min(model.write_h, segment_h)
        survived = pay(writing_h)
        if survived:
            saved_h = saved_h if pending_h is None else pending_h
            pending_h = None
            survived = pay(segment_h - writing_h + model.save_h)
        if survived:
            progress_h += segment_h
            pending_h = progress_h
        else:
            while not pay(model.restart_h):
                pass
            progress_h, pending_h = saved_h, None
    return wall_h, paid_h, losses


@pytest.mark.parametrize(
    ("compute_h", "model"),
    [
        (48, Interruptions(1 / 6, 0.1, 0.33, 0.5, 0.01, 0.05)),
        (100, Interruptions(0.5, 0.1, 1.0, 0.3, 0.01, 0.02)),
        (10, Interruptions(0.05, 0.1, 0.3, 0.2, 0.001, 0.01)),
        (48, Interruptions(1.0, 0.1, 0.1, 1.0, 0.01, 0.0)),
        (200, Interruptions(0.02, 0.1, 0.5, 1.0, 0.02, 0.1)),
        (5, Interruptions(0.3, 0.1, 0.5, 5.0, 0.0, 0.0)),
    ],
)
def test_jobs_that_are_played_through_agree(compute_h, model):
    rng = random.Random(1)
    walls, paids, losses = zip(*(play(rng, compute_h, model) for _ in range(PLAYED)), strict=True)
    found = duration(compute_h, model)
    assert found.paid_h == pytest.approx(statistics.mean(paids), rel=0.02)
    assert found.interruptions == pytest.approx(statistics.mean(losses), rel=0.06)
    done = [sum(w <= h for w in walls) / PLAYED for h in (found.p50_h, found.p95_h)]
    untouched = sum(n == 0 for n in losses) / PLAYED  # below that share nothing can be told apart
    assert done[0] == pytest.approx(max(0.5, untouched), abs=0.05)
    assert done[1] == pytest.approx(0.95, abs=0.02)


def test_without_interruptions_only_the_start_and_the_saves_are_added():
    model = Interruptions(0.0, 0.1, 1.0, 2.0, 0.01, 0.5)
    found = duration(10, model)
    assert found.paid_h == found.p95_h == pytest.approx(10 + 0.1 + 5 * 0.01)


def test_what_never_gets_through_is_infinite():
    found = duration(1000, Interruptions(1.0, 0.1, 0.1, 1000.0, 0.0, 0.0))
    assert math.isinf(found.paid_h) and math.isinf(found.p95_h)


def test_the_best_interval_is_the_best():
    rate, save_h, compute_h = 0.2, 0.005, 100.0
    best = optimal_interval(save_h, 1 / rate)

    def paid_h(interval_h):
        return duration(compute_h, Interruptions(rate, 0.1, 0, interval_h, save_h, 0.0)).paid_h

    assert paid_h(best) < min(paid_h(best * 0.7), paid_h(best * 1.4))
