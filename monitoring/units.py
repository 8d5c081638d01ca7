"""Formats numbers and texts for people, alike on the console and in the report."""

import math
import unicodedata


def compact(value: float) -> str:
    """Returns a count or rate in at most three figures: `812`, `8.1k`, `1.2M`, `3.4B`.

    Args:
        value: Count or rate.
    """
    if not math.isfinite(value):
        return str(value)
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:  # 999.96k reads 1.0M, not 1000k
            return f"{value / size:.{1 if abs(value) < 99.95 * size else 0}f}{suffix}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def duration(seconds: float) -> str:
    """Returns a duration as `8s`, `3m12s`, `2h05m` or `4d03h`.

    Args:
        seconds: Length of time in seconds.
    """
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def gibibytes(num_bytes: float) -> str:
    """Returns a size as `12.3 GiB`, or in MiB below a tenth of a GiB.

    Args:
        num_bytes: Size in bytes.
    """
    if num_bytes < 0.1 * 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"


def printable(text: str) -> str:
    """Returns text without control characters: generated escapes could drive the terminal.

    Args:
        text: Any text; line ends and tabs stay.
    """
    return "".join(c if c in "\n\t" or not _is_control(c) else "\ufffd" for c in text)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs")
