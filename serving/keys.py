"""API keys, in a JSON file that holds no key: only the digest of each.

    [{"id": "alice", "sha256": "...", "created": "2026-11-25T10:00:00+00:00",
      "limits": {"requests_per_minute": 60}, "admin": false}, ...]

A key is 32 random bytes, so a fast hash is right: slow ones make guessing a person's password
dear, and there is no guessing 256 random bits. A key is looked up by its digest; how long that
takes tells nothing that helps to find a key.
"""

import dataclasses
import hashlib
import json
import logging
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.errors import ConfigError, ExitCode
from core.folder import locked, write_file
from serving.admission import KeyLimits

_PREFIX = "sf-"
_FIX = "mend it, or create keys anew: python -m serving key create NAME"
_LIMITS = [limit.name for limit in dataclasses.fields(KeyLimits)]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What is known of a key.

    Attributes:
        id: Name that stands in logs and metrics.
        sha256: Digest of the key in hexadecimal.
        created: ISO 8601.
        limits: What it may take.
        admin: May do what concerns other keys.
    """

    id: str
    sha256: str = field(repr=False)
    created: str
    limits: KeyLimits = KeyLimits()
    admin: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.id, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.id)):
            rule = "is no name for a key"
            raise ConfigError("key", repr(self.id), rule, "use 1 to 64 of A-Z a-z 0-9 . _ -")


class Keys:
    """The keys of a file, as it is now: it is read again when it has changed.

    Where it cannot be read again the keys stay as they were, and the log says so: a slip in an
    editor shuts nobody out. A key is revoked when the file can be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = _version(path)
        self._by_digest = _by_digest(path)

    @classmethod
    def load(cls, path: Path) -> "Keys":
        """Reads the file.

        Raises:
            ConfigError: It cannot be read, or is not what `create` writes.
        """
        return cls(path)

    def find(self, authorization: str | None) -> Key | None:
        """The key that a request carries.

        Args:
            authorization: Its `Authorization` header: `Bearer sf-...`.

        Returns:
            None where it carries none that is valid.
        """
        self._read_again()
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self._by_digest.get(_digest(token.strip()))

    def named(self, id: str) -> Key | None:
        """The key of that name, for what is done in its name later; None: it was revoked."""
        self._read_again()
        return next((key for key in self._by_digest.values() if key.id == id), None)

    def _read_again(self) -> None:
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._by_digest = _by_digest(self._path)
        except ConfigError as e:
            _logger.error("keys stay as they were: %s", e)


def create(path: Path, id: str, limits: KeyLimits | None = None, admin: bool = False) -> str:
    """Adds a key to the file, which is made if need be.

    Returns:
        The key. It is kept nowhere.

    Raises:
        ConfigError: There is one of that name, or the file is damaged or cannot be written.
    """
    token = _PREFIX + secrets.token_urlsafe(32)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    key = Key(id, _digest(token), created, limits or KeyLimits(), admin)
    with _editing(path):
        keys = read_keys(path) if path.exists() else []
        if id in (other.id for other in keys):
            raise ConfigError("key", id, "exists already", "revoke it first, or use another name")
        _write(path, [*keys, key])
    return token


def revoke(path: Path, id: str) -> None:
    """Takes a key out of the file; servers that run see it with their next request.

    Raises:
        ConfigError: There is none of that name, or the file is damaged or cannot be written.
    """
    with _editing(path):
        keys = read_keys(path)
        if id not in (key.id for key in keys):
            names = ", ".join(key.id for key in keys) or "none"
            raise ConfigError("key", id, "does not exist", f"there are: {names}")
        _write(path, [key for key in keys if key.id != id])


def read_keys(path: Path) -> list[Key]:
    """The keys of a file.

    Raises:
        ConfigError: It cannot be read, or is not what `create` writes.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError("keys", path, e.strerror or str(e), "check the path") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError("keys", path, f"is not JSON ({e})", _FIX) from e
    if not isinstance(entries, list):
        raise ConfigError("keys", path, "is not a list of keys", _FIX)
    keys = [_parse(path, i, entry) for i, entry in enumerate(entries, 1)]
    for name in ("id", "sha256"):
        if len({getattr(key, name) for key in keys}) < len(keys):
            raise ConfigError("keys", path, f"has the same {name} twice", _FIX)
    return keys


def create_command(path: Path, id: str, words: Sequence[str]) -> int:
    """`key create NAME [requests_per_minute=60 ...] [admin=true]`: prints the key, only now.

    Args:
        path: Of the file.
        id: Of the key.
        words: Limits and `admin`, as `name=value`.

    Returns:
        The exit code.

    Raises:
        ConfigError: As `create`, or a word means nothing.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in (*_LIMITS, "admin"):
            raise ConfigError("key", word, "is no setting", f"use {', '.join(_LIMITS)} or admin")
        try:
            values[name] = json.loads(text)
        except ValueError as e:
            raise ConfigError(name, text, "is no value", "use a number, or true for admin") from e
    admin = values.pop("admin", False)
    if not isinstance(admin, bool):
        raise ConfigError("admin", admin, "is neither true nor false", "use admin=true")
    print(create(path, id, _limits(values), admin))
    return ExitCode.FINISHED


def revoke_command(path: Path, id: str) -> int:
    """`key revoke NAME`.

    Returns:
        The exit code.

    Raises:
        ConfigError: As `revoke`.
    """
    revoke(path, id)
    print(f"{id} is revoked")
    return ExitCode.FINISHED


def list_command(path: Path) -> int:
    """`key list`: a line for each key.

    Returns:
        The exit code.

    Raises:
        ConfigError: As `read_keys`.
    """
    for key in read_keys(path):
        words = [f"{name}={value:g}" for name, value in _given(key.limits).items()]
        words += ["admin=true"] if key.admin else []
        print(f"{key.id}  {key.created}  {' '.join(words)}".rstrip())
    return ExitCode.FINISHED


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def _by_digest(path: Path) -> dict[str, Key]:
    return {key.sha256: key for key in read_keys(path)}


def _version(path: Path) -> tuple[int, int, int] | None:
    """What changes with the file; None: there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _given(limits: KeyLimits) -> dict[str, float]:
    return {name: value for name, value in vars(limits).items() if value is not None}


def _limits(values: Any) -> KeyLimits:
    if not isinstance(values, dict) or not values.keys() <= set(_LIMITS):
        raise ConfigError("limits", values, "are no limits", f"use {', '.join(_LIMITS)}")
    for name, value in values.items():
        whole = name == "max_concurrent"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            fix = "use a whole number" if whole else "use a number"
            raise ConfigError(name, json.dumps(value), "is no limit", fix)
    return KeyLimits(**values)


def _parse(path: Path, number: int, entry: Any) -> Key:
    try:
        limits = _limits(entry.pop("limits", {}))
        key = Key(limits=limits, **entry)
    except (ConfigError, TypeError, AttributeError) as e:
        text = " ".join(str(e).split()).replace("Key.__init__() ", "")
        raise ConfigError("keys", path, f"entry {number} is no key ({text})", _FIX) from e
    digest_is_one = isinstance(key.sha256, str) and re.fullmatch("[0-9a-f]{64}", key.sha256)
    if not (digest_is_one and isinstance(key.created, str) and isinstance(key.admin, bool)):
        rule = f"entry {number} has a sha256, created or admin of the wrong kind"
        raise ConfigError("keys", path, rule, _FIX)
    return key


@contextmanager
def _editing(path: Path) -> Iterator[None]:
    """Of two commands at once neither undoes the other."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock"), mode=0o600):
            yield
    except OSError as e:
        raise ConfigError("keys", path, e.strerror or str(e), "check the path") from e


def _write(path: Path, keys: Sequence[Key]) -> None:
    """Replaces the file in one step; only its owner may read it."""
    entries = [dataclasses.asdict(key) | {"limits": _given(key.limits)} for key in keys]
    write_file(path, json.dumps(entries, indent=2) + "\n", mode=0o600)
