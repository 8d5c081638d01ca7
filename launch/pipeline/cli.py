"""The command line of `python -m launch pipeline`."""

import argparse
from collections.abc import Sequence
from typing import Any

from launch.words import add_words, settings_of

_PIPELINE = """\
Runs the stages that launch.stages names on this machine, one after another. A stage that is done is
not run again; an input that has changed since its stage wrote it is refused."""

_EXAMPLES = """\
example:
  python -m launch pipeline experiment=mine 'launch.stages=[train,compress,release]'

exit codes: 0 all are done; 33 a stage was stopped, start again; 2 a stage refuses; 1 one failed
"""


def add_verbs(commands: Any) -> None:
    """Adds `pipeline` to the parsers of `python -m launch`.

    Args:
        commands: Object that `add_subparsers` returned.
    """
    parser = commands.add_parser(
        "pipeline",
        help="run stages one after another on this machine",
        description=_PIPELINE,
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=_pipeline)
    add_words(parser, "settings of the job")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--only", metavar="STAGE", help="run this stage only")
    one.add_argument(
        "--record",
        metavar="STAGE",
        help="run nothing; record that this stage was run by other means",
    )


def _pipeline(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from core.errors import ConfigError, ExitCode
    from launch.pipeline.chain import chain_of

    settings = settings_of(options)
    chain = chain_of(settings, options.config_dir)
    names = [stage.value for stage in settings.launch.stages]
    for option, name in (("--only", options.only), ("--record", options.record)):
        if name is not None and name not in names:
            raise ConfigError(option, name, "not in launch.stages", f"one of {', '.join(names)}")
    if options.record is not None:
        chain.record(options.record)
        return ExitCode.FINISHED
    return chain.run(options.only)
