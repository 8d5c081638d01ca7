"""Command lines of verbs, options and words, for programs that need more than settings."""

import argparse
import math
import sys
from collections.abc import Callable
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, NoReturn

from core.errors import ExitCode
from core.version import version


class OptionParser(argparse.ArgumentParser):
    """Parses as argparse does, and refuses what is wrong in one line, with exit code 2.

    An option that is given twice is refused, as `Command` refuses a key: argparse takes the last.

    Attributes:
        more_help: Function that returns the end of the help page; called only for `--help`, so that
            it may import what is slow.
    """

    more_help: Callable[[], str] | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def add_version(self) -> None:
        """Adds `--version`."""
        self.add_argument("--version", action=_Version, nargs=0, help="print the version")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses options; names the nearest one for a misspelt one."""
        words = list(sys.argv[1:] if args is None else args)
        self._refuse_repeated(words)
        parsed, more = super().parse_known_args(words, namespace)
        for option in (word.partition("=")[0] for word in more if word.startswith("--")):
            if near := get_close_matches(option, self._option_string_actions, n=1):
                self.error(f"unrecognized arguments: {option}; did you mean {near[0]}?")
        return parsed, more

    def format_help(self) -> str:
        page = super().format_help()
        return page if self.more_help is None else f"{page}\n{self.more_help()}"

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.BAD_CONFIG, f"{self.prog}: {message}; see --help\n")

    def _refuse_repeated(self, words: list[str]) -> None:
        found: set[argparse.Action] = set()
        for word in takewhile(lambda word: word != "--", words):
            # A value may follow at once: `--output=FILE`, `-oFILE`.
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            action = self._option_string_actions.get(name)
            if action in found:
                self.error(f"argument {name}: is given twice; leave one out")
            if action is not None:
                found.add(action)


class _Version(argparse.Action):
    """Prints the version. An action, since finding the version starts git."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"spotforge {version()}")
        parser.exit()


def count(least: int = 1) -> Callable[[str], int]:
    """Returns a parser of whole numbers of at least `least`, as the type of an option."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def number(least: float | None = None) -> Callable[[str], float]:
    """Returns a parser of finite numbers of at least `least`, or above 0 if it is None."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan  # breaks every bound
        if not (value > 0 if least is None else value >= least) or math.isinf(value):
            rule = "above 0" if least is None else f"of at least {least:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {rule}")
        return value

    return parse
