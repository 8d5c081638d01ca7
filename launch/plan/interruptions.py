"""What interruptions cost a job: in hours that are paid, and in hours until it is done.

Symbols: rate of interruptions of the whole gang (1/h), progress s between two checkpoints with the
time that saving takes, restart r. Interruptions come at random, as a Poisson process does; what was
not saved is lost. Expected hours are those of Daly, "A higher order estimate of the optimum
checkpoint interval" (2006), equation 13; the spread follows from the same assumptions.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

_NORMAL = NormalDist()
_MOST_EXPONENT = 30.0  # e^30 attempts: it never gets through


@dataclass(frozen=True, slots=True)
class Interruptions:
    """How a job is interrupted, and what it does about it. Everything in hours.

    Attributes:
        per_h: Of the whole gang.
        restart_h: From a launch to the first new step; paid.
        wait_h: Mean time until there are nodes again; not paid.
        interval_h: Progress between two checkpoints.
        save_h: For which a save holds up the steps.
        write_h: Until a save is complete, from its beginning.
    """

    per_h: float
    restart_h: float
    wait_h: float
    interval_h: float
    save_h: float
    write_h: float


@dataclass(frozen=True, slots=True)
class Duration:
    """How long a job takes; infinite where it never gets from one checkpoint to the next.

    Attributes:
        paid_h: Expected hours on its nodes.
        interruptions: Expected.
        p50_h: Hours until it is done, half of the time.
        p95_h: Hours until it is done, 19 times of 20.
    """

    paid_h: float
    interruptions: float
    p50_h: float
    p95_h: float


def best_interval_h(per_h: float, save_h: float, compute_h: float) -> float:
    """The interval at which saving and repeating cost least (Young 1974), at most the whole job.

    Args:
        per_h: Interruptions of the whole gang.
        save_h: For which a save holds up the steps.
        compute_h: Of the job.
    """
    return min(compute_h, math.sqrt(2 * save_h / per_h)) if per_h > 0 else compute_h


def duration(compute_h: float, model: Interruptions) -> Duration:
    """How long a job takes.

    Args:
        compute_h: Without interruptions, starts and saves.
        model: How it is interrupted.
    """
    interval_h = min(model.interval_h, compute_h)
    num_segments = compute_h / interval_h
    undisturbed_h = model.restart_h + compute_h + num_segments * model.save_h
    if model.per_h == 0:
        return Duration(undisturbed_h, 0.0, undisturbed_h, undisturbed_h)
    rate = model.per_h
    # A checkpoint counts once it is complete, so that much more is at stake at any moment.
    segment_h = interval_h + model.save_h
    exposed_h = segment_h + min(model.write_h, interval_h)
    if rate * max(exposed_h, model.restart_h) > _MOST_EXPONENT:
        return Duration(math.inf, math.inf, math.inf, math.inf)
    losses = math.expm1(rate * segment_h)  # of a segment, on average
    lost_h, lost_square_h2 = _truncated(rate, segment_h)
    lost_h += exposed_h - segment_h
    again = math.expm1(
        rate * model.restart_h
    )  # starts that are lost themselves, of an interruption
    again_h, _ = _truncated(rate, model.restart_h)
    paid_h = lost_h + model.restart_h + again * again_h
    delay_h = paid_h + (1 + again) * model.wait_h
    variance_h2 = lost_square_h2 - _truncated(rate, segment_h)[0] ** 2
    variance_h2 += (1 + again) * model.wait_h**2
    variance_h2 += again * (1 + again) * (again_h + model.wait_h) ** 2
    mean_h = num_segments * losses * delay_h
    variance = num_segments * losses * (variance_h2 + (1 + losses) * delay_h**2)
    none = math.exp(-rate * segment_h * num_segments)
    return Duration(
        paid_h=undisturbed_h + num_segments * losses * paid_h + again * again_h,
        interruptions=(num_segments * losses + 1) * (1 + again) - 1,
        p50_h=undisturbed_h + _quantile(0.50, none, mean_h, variance),
        p95_h=undisturbed_h + _quantile(0.95, none, mean_h, variance),
    )


def _truncated(rate: float, most_h: float) -> tuple[float, float]:
    """Mean and mean square of the time to an interruption that comes before `most_h`."""
    x = rate * most_h
    if x < 1e-4:  # nearly uniform; the formula would cancel out
        return most_h / 2, most_h**2 / 3
    mean = 1 / rate - most_h / math.expm1(x)
    square = 2 / rate**2 - (most_h**2 + 2 * most_h / rate) / math.expm1(x)
    return mean, square


def _quantile(p: float, none: float, mean: float, variance: float) -> float:
    """Of a delay that is zero with chance `none`, else gamma with the moments that are left.

    Wilson and Hilferty (1931): the cube root of a gamma variable is nearly normal.
    """
    if p <= none or mean == 0:
        return 0.0
    some = 1 - none
    mean_some = mean / some
    variance_some = (variance + mean**2) / some - mean_some**2
    spread = max(variance_some, 1e-12 * mean_some**2) / (9 * mean_some**2)
    z = _NORMAL.inv_cdf((p - none) / some)
    return mean_some * max(0.0, 1 - spread + z * math.sqrt(spread)) ** 3
