"""Amounts in a hint, which must suffice when they are typed in."""

import math


def rounded_up(value: float, digits: int = 2) -> str:
    """The least number of so many decimals that is not below a value: `578.48` of 578.4711.

    Args:
        value: From 0.
        digits: Behind the point.
    """
    unit = 10**digits
    units = round(value * unit)
    if units / unit < value:
        units = math.floor(value * unit) + 1
    return f"{units / unit:.{digits}f}"
