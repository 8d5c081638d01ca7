"""Rounding of the amounts that a hint suggests: they must suffice when they are typed in."""

import math


def rounded_up(value: float, digits: int = 2) -> str:
    """Returns the value, rounded up to a number of decimals: `578.48` for 578.4711.

    Args:
        value: Number of at least 0.
        digits: Number of decimals.
    """
    # math.ceil alone would turn 0.07 into 0.08, since 0.07 * 100 is 7.000000000000001.
    unit = 10**digits
    units = round(value * unit)
    if units / unit < value:
        units = math.floor(value * unit) + 1
    return f"{units / unit:.{digits}f}"
