"""`python -m launch`: what a job costs, where it runs, and that it goes on."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from core.errors import ExitCode, SpotforgeError
from core.version import version
from launch.budget import cli as budget
from launch.catalog import cli as catalog
from launch.elastic import cli as elastic
from launch.pipeline import cli as pipeline
from launch.place import cli as place
from launch.plan import cli as plan
from launch.simulation import cli as simulation
from launch.words import shown_settings

_DESCRIPTION = "Knows what a job costs, places it, and keeps it going on machines that come and go."


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line.

    Attributes:
        more_help: Makes the end of the help page, where that takes imports.
    """

    more_help: Callable[[], str] | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; the parser of a command names the option that may have been meant."""
        parsed, more = super().parse_known_args(args, namespace)
        for option in (word.partition("=")[0] for word in more if word.startswith("--")):
            if near := get_close_matches(option, self._option_string_actions, n=1):
                self.error(f"unrecognized arguments: {option}; did you mean {near[0]}?")
        return parsed, more

    def format_help(self) -> str:
        page = super().format_help()
        return page if self.more_help is None else f"{page}\n{self.more_help()}"

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.BAD_CONFIG, f"{self.prog}: {message}; see --help\n")


class _Version(argparse.Action):
    """Prints the version, which takes a call of git."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"spotforge {version()}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m launch", description=_DESCRIPTION)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="verb", required=True)
    # each gives its parsers a `run(options, words after --)`
    for package in (plan, place, catalog, budget, elastic, pipeline, simulation):
        package.add_verbs(commands)
    commands.metavar = " | ".join(commands.choices)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        arguments: Those of the command line, unless given.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    parser = _parser()
    options, more = parser.parse_known_args(words[:end])
    if more and ("words" not in options or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # key=value behind an option, which argparse does not put with the others
        options.words += more
    try:
        if getattr(options, "cfg", None) is not None:
            print(shown_settings(options), end="")
            return ExitCode.FINISHED
        return int(options.run(options, words[end + 1 :]))
    except SpotforgeError as e:
        print(e, file=sys.stderr)
        return e.exit_code


def program() -> int:
    """`main` with a terminal, or a pipe whose other end may go away (`| head`)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that its encoding lacks, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(program())
