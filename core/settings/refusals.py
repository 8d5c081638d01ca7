"""Turns errors of Hydra, OmegaConf and YAML into one-line errors: key, value, rule, fix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from core.errors import ConfigError
from core.settings.keys import matches

if TYPE_CHECKING:
    from core.settings.command import Command

# Lowest difflib ratios at which a name is suggested: among sibling keys, and among all keys. Beside
# the misspelt key a worse match is still likely meant.
_LIKE, _ALIKE = 0.57, 0.8
_FEW = 0.5  # among the options of one group, of which one is meant: `tyni` is `tiny`


def unreadable(word: str, error: HydraException) -> ConfigError:
    """Returns the error for a word that Hydra cannot parse.

    Args:
        word: Word as the user gave it.
        error: Exception that Hydra raised.
    """
    key, equals, value = word.partition("=")
    if not equals:
        return ConfigError("word", word, "is not key=value", f"write {word}=VALUE")
    detail = " ".join(str(error.__context__ or "").split())  # empty, or a message of the lexer
    rule = f"cannot be read ({detail})" if detail.startswith("token") else "cannot be read"
    fix = """close its quotes and brackets; quote special characters: 'key="value"'"""
    return ConfigError(key, value, rule, fix)


def refusal(
    error: Exception, command: Command, words: Sequence[str], config_dir: Path | None
) -> ConfigError:
    """Returns a one-line error for an exception that composing raised.

    Args:
        error: Exception that composing raised.
        command: Program whose settings were composed.
        words: Words of the command line.
        config_dir: Folder with the user's own options.
    """
    chain = _chain(error)
    for cause in chain:
        if isinstance(cause, ConfigError):
            return cause
        if isinstance(cause, MissingConfigException):
            return _no_such_option(cause)
    if isinstance(error, yaml.YAMLError):
        rule = f"is not YAML: {' '.join(str(error).split())}"
        return ConfigError("--config-dir", config_dir, rule, "correct the file")
    if isinstance(error, UnicodeDecodeError):
        rule = f"has a file that is not UTF-8 ({error})"
        return ConfigError("--config-dir", config_dir, rule, "save it as UTF-8")
    see = f"{command.program} --help lists the keys"
    # OmegaConf's innermost error is the most precise, unless its message has unfilled placeholders.
    of_omegaconf = [c for c in reversed(chain) if isinstance(c, OmegaConfBaseException)]
    inner = next((c for c in of_omegaconf if "$" not in str(c)), error)
    text, key = _first_line(inner), _full_key(inner) or _merged_key(chain)
    given_key, given_value = _given(command, words, key)
    if isinstance(inner, MissingMandatoryValue):
        return ConfigError(key, "???", "must be given", f"write {key}=VALUE; {see}")
    if isinstance(inner, ConfigKeyError | ConfigAttributeError) and key:
        parent = given_key.lstrip("+~").rpartition(".")[0]
        rule = "there is no such key" + (f" in {parent}" if parent else "")
        return ConfigError(given_key, given_value, rule, _nearest(command, given_key) or see)
    if isinstance(inner, OmegaConfBaseException):
        if not key:  # the fault is in a file as a whole
            return ConfigError("--config-dir", config_dir, text, "correct the file")
        return ConfigError(key, given_value, text, see)
    # An error of Hydra itself quotes the key or the word.
    named = re.search(r"'([^']+)'", text)
    given_key, given_value = _given(command, words, named[1] if named else "")
    if "defaults list" in text:
        fix = _nearest(command, given_key) or see
        return ConfigError(given_key, given_value, "there is no such group here", fix)
    if isinstance(error, ValueError):  # Hydra does not say which key was null
        nulls = [word.removesuffix("=null") for word in words if word.endswith("=null")]
        given_key, given_value = nulls[0] if len(nulls) == 1 else "word", "null"
    return ConfigError(given_key, given_value, text, f"see {command.program} --help")


def _no_such_option(error: MissingConfigException) -> ConfigError:
    name = error.missing_cfg_file or ""
    group, _, option = name.rpartition("/")
    options = sorted(error.options or [])
    near = get_close_matches(option, options, n=1, cutoff=_FEW)
    listed = f"there are {', '.join(options)}" if options else "there are none"
    fix = f"did you mean {near[0]}? {listed}" if near else listed
    return ConfigError(group or "word", option, "there is no such option", fix)


def _nearest(command: Command, key: str) -> str:
    """Returns the fix for an unknown key, or "" if no known key is similar."""
    holders = [known for known in command.keys if known.group and matches(known.path, key)]
    if options := sorted({option for k in holders for option in command.options_with(k)}):
        return f"it is a key of {key.partition('.')[0]}={' | '.join(options)}"
    parent, _, leaf = key.rpartition(".")
    siblings, anywhere = {}, {}
    for known in reversed(command.keys):  # reversed: the first of equal names is kept
        known_parent, _, known_leaf = known.path.rpartition(".")
        anywhere[known_leaf] = known.path
        if known_parent == parent or matches(known_parent, parent):
            siblings[known_leaf] = f"{parent}.{known_leaf}" if parent else known_leaf
    if leaf in anywhere:
        return f"did you mean {anywhere[leaf]}?"
    if near := get_close_matches(leaf, siblings, n=1, cutoff=_LIKE):
        return f"did you mean {siblings[near[0]]}?"
    # A mistake in the parent's name makes every sibling useless, so whole paths are compared too.
    whole = [*(known.path for known in command.keys), *command.group_names]
    near = get_close_matches(key, whole, n=1, cutoff=_ALIKE)
    if near and (not siblings or not parent):
        return f"did you mean {near[0]}?"
    if near := get_close_matches(leaf, anywhere, n=1, cutoff=_ALIKE):
        return f"did you mean {anywhere[near[0]]}?"
    return ""


def _given(command: Command, words: Sequence[str], key: str) -> tuple[str, str]:
    """Returns key and value of the word that sets `key`, or a key above or below it."""
    for word in words:
        name, _, value = word.lstrip("+~").partition("=")
        if name == key or (key and name.startswith(f"{key}.")):
            return name, value
        if key.startswith((f"{name}.", f"{name}[")) and name not in command.group_names:
            return key, value
    return key, "..."  # a file sets it


def _merged_key(chain: Sequence[BaseException]) -> str:
    """Returns the key of the word that Hydra could not merge, or "" if no error names it."""
    for error in chain:
        if match := re.match(r"Error merging override [+~]*([^=]+)=", str(error)):
            return match[1]
    return ""


def _full_key(error: BaseException) -> str:
    return str(getattr(error, "full_key", None) or "")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain
