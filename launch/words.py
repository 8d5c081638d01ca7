"""Shared code of the commands of `python -m launch` that take settings.

Hydra is imported only where settings are composed, so that `--help` is fast.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.settings import Settings


def add_words(parser: argparse.ArgumentParser, help_: str) -> None:
    """Adds `key=value`, `--config-dir` and `--cfg` to a command.

    Args:
        parser: Parser of the command.
        help_: Description of the words, for `--help`.
    """
    parser.add_argument("words", metavar="key=value", nargs="*", help=help_)
    parser.add_argument(
        "--config-dir", metavar="DIR", type=Path, help="look for options in DIR too"
    )
    parser.add_argument(
        "--cfg", metavar="job", choices=["job"], help="print the whole configuration and stop"
    )


def settings_of(options: argparse.Namespace, rest: Sequence[str] = ()) -> "Settings":
    """Composes the settings of a command line.

    Args:
        options: Options from a parser that `add_words` has extended.
        rest: Further words, given after `--`.

    Raises:
        ConfigError: See `compose_settings`.
    """
    from launch.settings import compose_settings

    return compose_settings([*options.words, *rest], options.config_dir)


def shown_settings(options: argparse.Namespace) -> str:
    """Returns the settings of trainer and launcher as YAML, for `--cfg job`."""
    from omegaconf import OmegaConf

    from launch.settings import LAUNCH, split_words
    from trainer.command import TRAINER

    of_trainer, of_launch = split_words(options.words)
    trees = (
        TRAINER.compose_tree(of_trainer, options.config_dir),
        LAUNCH.compose_tree(of_launch, options.config_dir),
    )
    return "".join(OmegaConf.to_yaml(tree) for tree in trees)


def launch_keys() -> str:
    """Returns the description of the keys under `launch.`, for `--help`."""
    from core.settings.help import key_lines
    from launch.settings import LAUNCH

    return f"keys of launch., beside those of python -m trainer --help:\n{key_lines(LAUNCH)}\n"
