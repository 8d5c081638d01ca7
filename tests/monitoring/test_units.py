import pytest

from monitoring.units import compact, duration, gibibytes, printable


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.5, "0.5"),
        (812.4, "812"),
        (8123, "8.1k"),
        (124_439_808, "124M"),
        (999_960, "1.0M"),
        (7e9, "7.0B"),
        (float("nan"), "nan"),
    ],
)
def test_compact(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(8.4, "8s"), (59.6, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (356_400, "4d03h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_gibibytes():
    assert gibibytes(12.3 * 2**30) == "12.3 GiB"
    assert gibibytes(2**20) == "1.0 MiB"


def test_printable_keeps_lines_and_letters():
    assert printable("é\tक\n\x1b[2J\x07") == "é\tक\n\ufffd[2J\ufffd"
