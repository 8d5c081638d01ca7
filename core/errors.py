"""Exceptions that spotforge raises for a user to read, and the exit code of each.

SpotforgeError                exit 1
 |- ConfigError               exit 2: the user got something wrong: key, value, rule, fix
 |   |- MissingExtraError     exit 2: an optional dependency is not installed
 |   |- DamagedError          exit 2: bytes on disk are not the bytes that were written
 |   |- OwnDiskError          exit 2: the disk of one machine is full; under a supervisor, exit 33
 |   `- SupersededError       exit 2: a later start of the same run has taken over
  |- DivergedError             exit 1: the loss is NaN or infinite, or spiked too often
 `- Interrupted               exit 33: told to stop; start the same command again to go on
"""

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every spotforge command."""

    FINISHED = 0
    FAILED = 1
    BAD_CONFIG = 2
    START_AGAIN = 33


class SpotforgeError(Exception):
    """Base of all errors that are raised for a user to read."""

    exit_code = ExitCode.FAILED
    # True where every rank raises the error, so that rank 0 alone prints it.
    seen_by_all = False


class ConfigError(SpotforgeError):
    """Refuses a setting, a file or a folder that cannot be used as given.

    Args:
        key: The configuration key (or file) to look at, e.g. `data.path`.
        value: Value that was found.
        rule: Rule that the value breaks.
        fix: Advice on what to do instead.
    """

    exit_code = ExitCode.BAD_CONFIG

    def __init__(self, key: str, value: object, rule: str, fix: str) -> None:
        # A file name may contain line breaks, and the message has to stay on one line.
        shown = str(value).replace("\n", "\\n").replace("\r", "\\r")
        super().__init__(f"{key}={shown}: {rule}; {fix}")
        self.key, self.value, self.rule, self.fix = key, value, rule, fix

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        # Exceptions cross process boundaries pickled, and any value may not be picklable.
        return type(self), (self.key, str(self.value), self.rule, self.fix)


class MissingExtraError(ConfigError):
    """Reports that an optional dependency is needed but not installed."""


class DamagedError(ConfigError):
    """Reports prepared data or a checkpoint whose digest does not match its manifest."""


class OwnDiskError(ConfigError):
    """Reports that the disk of one machine of several cannot be written; the others go on.

    Args:
        key: Setting that names the disk.
        value: Path on it.
        rule: Description of what failed, and where.
        fix: Advice on what to do.
        rank: A rank of that machine.
    """

    def __init__(self, key: str, value: object, rule: str, fix: str, rank: int) -> None:
        super().__init__(key, value, rule, fix)
        self.rank = rank

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str, int]]:  # type: ignore[override]
        return type(self), (self.key, str(self.value), self.rule, self.fix, self.rank)


class SupersededError(ConfigError):
    """Ends a start of a run, since a later start of the same run has taken over its checkpoints."""


class Interrupted(SpotforgeError):
    """Reports that a stop was requested before there was anything to save."""

    exit_code = ExitCode.START_AGAIN


class DivergedError(SpotforgeError):
    """Ends a training run that continuing would not repair; every rank raises it."""

    seen_by_all = True


def is_full(error: OSError) -> bool:
    """Returns whether an error says that a disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
