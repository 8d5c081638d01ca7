"""A command line of verbs and options: what is refused, in one line and with exit code 2."""

import argparse

import pytest

from core.settings.options import OptionParser, count, number


def parser():
    parser = OptionParser(prog="bike")
    ride = parser.add_subparsers(dest="verb", required=True).add_parser("ride")
    ride.add_argument("-g", "--gear", type=int)
    ride.add_argument("--fast", action="store_true")
    ride.add_argument("--over", nargs="+")
    return parser


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ride --gear 1 --gear 2", "--gear"),
        ("ride --gear=1 --gear=2", "--gear"),
        ("ride -g1 --gear 2", "--gear"),
        ("ride -g 1 -g2", "-g"),
        ("ride --fast --fast", "--fast"),
        ("ride --over hill --over dale", "--over"),
        ("ride --gears 1", "did you mean --gear?"),
        ("ride --gear one", "--gear"),
        ("rid", "'rid'"),
    ],
)
def test_what_is_wrong_is_one_line(line, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        parser().parse_args(line.split())
    assert exit_.value.code == 2
    [text] = capsys.readouterr().err.splitlines()
    assert text.startswith("bike") and said in text


def test_a_value_is_not_taken_for_an_option():
    options = parser().parse_args(["ride", "--over", "gear", "fast", "-g", "-1", "--fast"])
    assert (options.over, options.gear, options.fast) == (["gear", "fast"], -1, True)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (count(), "0"),
        (count(0), "-1"),
        (count(), "1.5"),
        (count(), ""),
        (number(), "0"),
        (number(0), "-0.1"),
        (number(), "nan"),
        (number(0), "inf"),
        (number(), "1e999"),
        (number(), "ten"),
    ],
)
def test_numbers_out_of_their_range(parse, text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse(text)


def test_numbers_within_their_range():
    assert (count()("1"), count(0)("0"), number()("0.5"), number(0)("0")) == (1, 0, 0.5, 0.0)
