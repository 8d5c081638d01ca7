"""The effect of interruptions on a job: its paid hours, and the hours until it is done.

Interruptions of the whole gang are a Poisson process with a rate per hour; each loses the progress
since the last checkpoint and costs a restart. A segment is the progress between two checkpoints,
with the time of its save. Expected hours are those of Daly, "A higher order estimate of the optimum
checkpoint interval" (2006), equation 13; the spread follows from the same assumptions.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

_NORMAL = NormalDist()
_MOST_EXPONENT = 30.0  # a segment that needs e^30 attempts is never finished


@dataclass(frozen=True, slots=True)
class Interruptions:
    """How a job is interrupted, and how it saves and restarts. All times are in hours.

    Attributes:
        per_h: Interruptions of the whole gang in an hour.
        restart_h: Time from a launch to the first new step; paid.
        wait_h: Mean time until nodes are available again; not paid.
        interval_h: Progress between two checkpoints.
        save_h: Time for which a save blocks training.
        write_h: Time from the end of the blocking part until the save is complete.
    """

    per_h: float
    restart_h: float
    wait_h: float
    interval_h: float
    save_h: float
    write_h: float


@dataclass(frozen=True, slots=True)
class Duration:
    """The duration of a job; infinite if it cannot get from one checkpoint to the next.

    Attributes:
        paid_h: Expected paid hours.
        interruptions: Expected number of interruptions.
        p50_h: Median of the hours until the job is done.
        p95_h: 95th percentile of the hours until the job is done.
    """

    paid_h: float
    interruptions: float
    p50_h: float
    p95_h: float


def duration(compute_h: float, model: Interruptions) -> Duration:
    """Computes the duration of a job.

    Args:
        compute_h: Hours that the job computes, without interruptions, starts and saves.
        model: Interruptions of the job.
    """
    interval_h = min(model.interval_h, compute_h)
    num_segments = compute_h / interval_h
    undisturbed_h = model.restart_h + compute_h + num_segments * model.save_h
    if model.per_h == 0:
        return Duration(undisturbed_h, 0.0, undisturbed_h, undisturbed_h)
    rate = model.per_h
    # A checkpoint counts only once it is written: until then an interruption loses the segment
    # before it as well.
    segment_h = interval_h + model.save_h
    exposed_h = segment_h + min(model.write_h, interval_h)
    if rate * max(exposed_h, model.restart_h) > _MOST_EXPONENT:
        return Duration(math.inf, math.inf, math.inf, math.inf)
    losses = math.expm1(rate * segment_h)  # expected losses in a segment
    lost_h, lost_square_h2 = _truncated(rate, segment_h)
    lost_h += exposed_h - segment_h
    # Expected restarts that are interrupted themselves, for one interruption.
    again = math.expm1(rate * model.restart_h)
    again_h, _ = _truncated(rate, model.restart_h)
    paid_h = lost_h + model.restart_h + again * again_h
    delay_h = paid_h + (1 + again) * model.wait_h
    # The variance of one delay: of the lost progress, of its waits (exponential, so each has the
    # square of its mean), and of the geometric number of repeated restarts.
    variance_h2 = lost_square_h2 - _truncated(rate, segment_h)[0] ** 2
    variance_h2 += (1 + again) * model.wait_h**2
    variance_h2 += again * (1 + again) * (again_h + model.wait_h) ** 2
    # The number of losses in a segment is geometric with variance losses * (1 + losses); the sum of
    # so many independent delays has the variance below (law of total variance).
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
    """Returns mean and mean square of the time to an interruption that comes before `most_h`."""
    x = rate * most_h
    # For a small x the time is nearly uniform, and the formulas below would cancel to noise.
    if x < 1e-4:
        return most_h / 2, most_h**2 / 3
    mean = 1 / rate - most_h / math.expm1(x)
    square = 2 / rate**2 - (most_h**2 + 2 * most_h / rate) / math.expm1(x)
    return mean, square


def _quantile(p: float, none: float, mean: float, variance: float) -> float:
    """Returns a quantile of the total delay.

    The delay is zero with probability `none`, and otherwise has a gamma distribution, such that the
    whole has the given mean and variance. By Wilson and Hilferty (1931) the cube root of a gamma
    variable is nearly normal.
    """
    if p <= none or mean == 0:
        return 0.0
    some = 1 - none
    mean_some = mean / some
    variance_some = (variance + mean**2) / some - mean_some**2
    spread = max(variance_some, 1e-12 * mean_some**2) / (9 * mean_some**2)
    z = _NORMAL.inv_cdf((p - none) / some)
    return mean_some * max(0.0, 1 - spread + z * math.sqrt(spread)) ** 3
