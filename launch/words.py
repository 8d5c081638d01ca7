"""What the commands of `python -m launch` that take settings have in common.

Nothing here imports Hydra until settings are composed, so that `--help` comes at once.
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
        parser: Of the command.
        help_: What the words are, for `--help`.
    """
    parser.add_argument("words", metavar="key=value", nargs="*", help=help_)
    parser.add_argument(
        "--config-dir", metavar="DIR", type=Path, help="look for options in DIR too"
    )
    parser.add_argument(
        "--cfg", metavar="job", choices=["job"], help="print the whole configuration and stop"
    )


def settings_of(options: argparse.Namespace, rest: Sequence[str] = ()) -> "Settings":
    """Composes the settings that a command line has.

    Args:
        options: Parsed by a parser to which `add_words` added.
        rest: Further words, from behind `--`.

    Raises:
        ConfigError: For whatever is wrong with them.
    """
    from launch.settings import compose_settings

    return compose_settings([*options.words, *rest], options.config_dir)


def shown_settings(options: argparse.Namespace) -> str:
    """The settings as YAML, for `--cfg job`: the trainer's, and `launch`."""
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
    """The keys of `launch.`, for `--help`."""
    from core.settings.help import key_lines
    from launch.settings import LAUNCH

    return f"keys of launch., beside those of python -m trainer --help:\n{key_lines(LAUNCH)}\n"
