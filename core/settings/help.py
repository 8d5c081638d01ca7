"""The page that `--help` prints, made of the dataclasses' docstrings and the files of options."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from core.settings.command import CONFIG_DIR, Command
from core.settings.keys import NAME, Key

_WIDTH = 100
_COLUMN = 34  # of what is said about a key


def help_page(command: Command, config_dir: Path | None = None) -> str:
    """Returns the page; nothing is composed, so that it comes at once.

    Args:
        command: The program.
        config_dir: A folder with more options, which are listed too.
    """
    usage = f"{command.program} [key=value ...]"
    if command.group_names:
        usage = f"{command.program} [group=option ...] [key=value ...]"
    parts = [f"{command.about}\n\n  {usage}"]
    if command.examples:
        parts.append(textwrap.indent(command.examples.strip("\n"), "  "))
    if groups := _groups(command, config_dir):
        parts.append("Groups (group=option):\n" + "\n".join(groups))
    parts.append(f"Keys (key=value):\n{key_lines(command)}")
    parts.append("Options, before words, after them or between:\n" + "\n".join(_options(command)))
    if command.notes:
        parts.append(command.notes.strip("\n"))
    return "\n\n".join(parts)


def key_lines(command: Command) -> str:
    """Returns a line or two about each key of a program, under the options that have it."""
    by_path: dict[str, list[Key]] = {}
    for key in command.keys:
        by_path.setdefault(key.path, []).append(key)
    sections: dict[str, list[str]] = {}
    short = {path: name for name, path in command.short.items()}
    for path, keys in by_path.items():
        name = short.get(path, path)
        if keys[0].is_open and not any(p.startswith(f"{path}.") for p in by_path):
            name += f".{NAME}"
        sections.setdefault(_holders(command, keys), []).append(_entry(name, _text(keys)))
    lines = []
    for holders, entries in sections.items():
        if holders:
            lines.append(textwrap.fill(f" of {holders}:", _WIDTH, subsequent_indent="    "))
        lines += entries
    return "\n".join(lines)


def _holders(command: Command, keys: list[Key]) -> str:
    """The options that have a key, of a group of which not all have it."""
    group = keys[0].group
    if not group or len(keys) == len(command.groups[group]):
        return ""
    options = sorted({option for key in keys for option in command.options_with(key)})
    return f"{group.partition('.')[0]}={' | '.join(options)}"


def _text(keys: list[Key]) -> str:
    """The first sentence about a key, and its choices."""
    # A sentence ends before a capital letter or a code span, not after "e.g.".
    text = re.split(r"(?<!e\.g)(?<!i\.e)\.\s+(?=[A-Z`])", keys[0].about)[0].rstrip(".")
    return f"{text} ({' | '.join(keys[0].choices)})" if keys[0].choices else text


def _groups(command: Command, config_dir: Path | None) -> list[str]:
    folders = [CONFIG_DIR, *([] if config_dir is None else [config_dir])]
    lines = []
    for group in command.group_names:
        options = sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})
        lines.append(_entry(group, " | ".join(options), column=14))
    return lines


def _options(command: Command) -> list[str]:
    options = {
        "--cfg job": "print the whole configuration and stop; with --resolve, interpolated",
        "--config-dir DIR": "look for options (GROUP/MINE.yaml) in DIR, too",
        "--multirun": "run every combination of comma-separated values, one after another",
        "--version": "print the version, and the commit where it is known",
        "--help": "print this",
    }
    if not command.has_files:
        del options["--config-dir DIR"]
    if not command.sweeps:
        del options["--multirun"]
    return [_entry(option, text) for option, text in options.items()]


def _entry(name: str, text: str, column: int = _COLUMN) -> str:
    """A name and, in a column of its own, a text."""
    head = f"  {name}"
    head = head.ljust(column) if len(head) < column else f"{head}\n{' ' * column}"
    body = textwrap.fill(
        text,
        _WIDTH,
        initial_indent=" " * column,
        subsequent_indent=" " * column,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return (head + body[column:]).rstrip()
