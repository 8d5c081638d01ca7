"""`python -m launch`: prices a job, places it, and keeps it running."""

import io
import os
import sys
from collections.abc import Sequence

from core.errors import ExitCode, SpotforgeError
from core.settings.options import OptionParser
from launch.budget import cli as budget
from launch.catalog import cli as catalog
from launch.elastic import cli as elastic
from launch.pipeline import cli as pipeline
from launch.place import cli as place
from launch.plan import cli as plan
from launch.simulation import cli as simulation
from launch.words import shown_settings

_DESCRIPTION = "Prices a job, places it, and keeps it running on machines that come and go."


def _parser() -> OptionParser:
    parser = OptionParser(prog="python -m launch", description=_DESCRIPTION)
    parser.add_version()
    commands = parser.add_subparsers(dest="verb", required=True)
    # Each package sets the default `run` of its parsers to a function of the options and the words
    # after `--`; `main` calls it.
    for package in (plan, place, catalog, budget, elastic, pipeline, simulation):
        package.add_verbs(commands)
    commands.metavar = " | ".join(commands.choices)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words of the command line; None: `sys.argv`.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    parser = _parser()
    options, more = parser.parse_known_args(words[:end])
    if more and ("words" not in options or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    # argparse fills a positional list once: key=value words behind an option are left over.
    if more:
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
    """Runs `main` on a terminal, or on a pipe that the reader may close early (`| head`)."""
    # A name that the terminal's encoding lacks is printed escaped, as Python does on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would fail on the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(program())
