"""What spotforge raises when it cannot go on, and the exit code that each means.

SpotforgeError                exit 1
 |- ConfigError               exit 2: the user got something wrong: key, value, rule, fix
 |   |- MissingExtraError     exit 2: an optional dependency is not installed
 |   `- DamagedError          exit 2: bytes on disk are not the bytes that were written
 |- DivergedError             exit 1: the loss is no number, or leapt too often
 `- Interrupted               exit 33: told to stop; start the same command again to go on
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes of every spotforge command."""

    FINISHED = 0
    FAILED = 1
    BAD_CONFIG = 2
    START_AGAIN = 33


class SpotforgeError(Exception):
    """Base of all errors that are raised for a user to read."""

    exit_code = ExitCode.FAILED
    seen_by_all = False  # set where every rank raised it, so that rank 0 speaks for all


class ConfigError(SpotforgeError):
    """A setting, a file or a folder that cannot be used as given.

    Args:
        key: The configuration key (or file) to look at, e.g. `data.path`.
        value: What it was.
        rule: Why that does not work.
        fix: What to do instead.
    """

    exit_code = ExitCode.BAD_CONFIG

    def __init__(self, key: str, value: object, rule: str, fix: str) -> None:
        shown = str(value).replace("\n", "\\n").replace("\r", "\\r")  # a file may be named so
        super().__init__(f"{key}={shown}: {rule}; {fix}")
        self.key, self.value, self.rule, self.fix = key, value, rule, fix

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        return type(self), (self.key, str(self.value), self.rule, self.fix)  # crosses processes


class MissingExtraError(ConfigError):
    """An optional dependency is needed and absent."""


class DamagedError(ConfigError):
    """Prepared data or a checkpoint whose digest does not match its manifest."""


class Interrupted(SpotforgeError):
    """A stop was requested before there was anything to save."""

    exit_code = ExitCode.START_AGAIN


class DivergedError(SpotforgeError):
    """Training went wrong in a way that going on would not mend; every rank raises it."""

    seen_by_all = True
