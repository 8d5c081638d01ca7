"""API keys, in a JSON file that contains only their digests.

    [{"id": "alice", "sha256": "...", "created": "2026-11-25T10:00:00+00:00",
      "limits": {"requests_per_minute": 60}, "admin": false}, ...]

A key is 32 random bytes, so a fast hash is enough: slow hashes protect passwords that can be
guessed, and 256 random bits cannot. A key is looked up by its digest, so the time that the lookup
takes reveals nothing that helps to find a key.
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
_FIX = "repair the file, or create new keys: python -m serving key create NAME"
_LIMITS = [limit.name for limit in dataclasses.fields(KeyLimits)]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """An entry of the file of keys.

    Attributes:
        id: Name of the key in logs and metrics.
        sha256: SHA-256 of the key in hexadecimal.
        created: Time of creation as ISO 8601.
        limits: Limits on what the key may use.
        admin: True: the key may use the admin endpoints and see other keys' data.
    """

    id: str
    sha256: str = field(repr=False)
    created: str
    limits: KeyLimits = KeyLimits()
    admin: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.id, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.id)):
            rule = "is not a valid name for a key"
            raise ConfigError("key", repr(self.id), rule, "use 1 to 64 of A-Z a-z 0-9 . _ -")


class Keys:
    """The keys of a file, which is read again whenever it has changed.

    If the file cannot be read again, the keys stay as they were and the log says so, so that a slip
    in an editor does not lock every client out. A revocation takes effect once the file is valid.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = _version(path)
        self._by_digest = _by_digest(path)

    @classmethod
    def load(cls, path: Path) -> "Keys":
        """Reads the file.

        Raises:
            ConfigError: The file cannot be read, or is not in the format that `create` writes.
        """
        return cls(path)

    def find(self, authorization: str | None) -> Key | None:
        """Returns the key of a request.

        Args:
            authorization: `Authorization` header of the request: `Bearer sf-...`.

        Returns:
            The key; None: the request has no valid key.
        """
        self._read_again()
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self._by_digest.get(_digest(token.strip()))

    def named(self, id: str) -> Key | None:
        """Returns the key with an id, for its batches that run later; None: it was revoked."""
        self._read_again()
        return next((key for key in self._by_digest.values() if key.id == id), None)

    def _read_again(self) -> None:
        # One `stat` a request is cheap, and a revoked key must not work until some timer fires.
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._by_digest = _by_digest(self._path)
        except ConfigError as e:
            _logger.error("keys stay as they were: %s", e)


def create(path: Path, id: str, limits: KeyLimits | None = None, admin: bool = False) -> str:
    """Adds a key to the file, which is created if it does not exist.

    Returns:
        The key, which is stored nowhere else.

    Raises:
        ConfigError: The name is taken, or the file is damaged or cannot be written.
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
    """Removes a key from the file; running servers refuse it from their next request on.

    Raises:
        ConfigError: There is no key with that name, or the file is damaged or cannot be written.
    """
    with _editing(path):
        keys = read_keys(path)
        if id not in (key.id for key in keys):
            names = ", ".join(key.id for key in keys) or "none"
            raise ConfigError("key", id, "does not exist", f"there are: {names}")
        _write(path, [key for key in keys if key.id != id])


def read_keys(path: Path) -> list[Key]:
    """Returns the keys of a file.

    Raises:
        ConfigError: The file cannot be read, or is not in the format that `create` writes.
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
    """Runs `key create NAME [requests_per_minute=60 ...] [admin=true]`, which prints the new key.

    Args:
        path: File of keys.
        id: Name of the key.
        words: Limits and `admin`, as `name=value`.

    Returns:
        The exit code.

    Raises:
        ConfigError: A word is not a valid setting, or `create` raised it.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in (*_LIMITS, "admin"):
            raise ConfigError("key", word, "is not a setting", f"use {', '.join(_LIMITS)} or admin")
        try:
            values[name] = json.loads(text)
        except ValueError as e:
            raise ConfigError(name, text, "is not JSON", "use a number, or true for admin") from e
    admin = values.pop("admin", False)
    if not isinstance(admin, bool):
        raise ConfigError("admin", admin, "is neither true nor false", "use admin=true")
    print(create(path, id, _limits(values), admin))
    return ExitCode.FINISHED


def revoke_command(path: Path, id: str) -> int:
    """Runs `key revoke NAME`.

    Returns:
        The exit code.

    Raises:
        ConfigError: See `revoke`.
    """
    revoke(path, id)
    print(f"{id} is revoked")
    return ExitCode.FINISHED


def list_command(path: Path) -> int:
    """Runs `key list`, which prints a line for each key.

    Returns:
        The exit code.

    Raises:
        ConfigError: See `read_keys`.
    """
    for key in read_keys(path):
        words = [f"{name}={value:g}" for name, value in _given(key.limits).items()]
        words += ["admin=true"] if key.admin else []
        print(f"{key.id}  {key.created}  {' '.join(words)}".rstrip())
    return ExitCode.FINISHED


def _digest(token: str) -> str:
    # Any header gets an answer, also one with characters that UTF-8 cannot encode.
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def _by_digest(path: Path) -> dict[str, Key]:
    return {key.sha256: key for key in read_keys(path)}


def _version(path: Path) -> tuple[int, int, int] | None:
    """Returns a value that changes whenever the file does; None: there is no file.

    The inode is part of it since `write_file` replaces the file, possibly within one tick of the
    file system's clock and with the same size.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _given(limits: KeyLimits) -> dict[str, float]:
    return {name: value for name, value in vars(limits).items() if value is not None}


def _limits(values: Any) -> KeyLimits:
    if not isinstance(values, dict) or not values.keys() <= set(_LIMITS):
        raise ConfigError("limits", values, "has an unknown limit", f"use {', '.join(_LIMITS)}")
    for name, value in values.items():
        whole = name == "max_concurrent"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            fix = "use a whole number" if whole else "use a number"
            raise ConfigError(name, json.dumps(value), "has the wrong type", fix)
    return KeyLimits(**values)


def _parse(path: Path, number: int, entry: Any) -> Key:
    try:
        limits = _limits(entry.pop("limits", {}))
        key = Key(limits=limits, **entry)
    except (ConfigError, TypeError, AttributeError) as e:
        text = " ".join(str(e).split()).replace("Key.__init__() ", "")
        raise ConfigError("keys", path, f"entry {number} is not a key ({text})", _FIX) from e
    digest_is_one = isinstance(key.sha256, str) and re.fullmatch("[0-9a-f]{64}", key.sha256)
    if not (digest_is_one and isinstance(key.created, str) and isinstance(key.admin, bool)):
        rule = f"entry {number} has a sha256, created or admin of the wrong type"
        raise ConfigError("keys", path, rule, _FIX)
    return key


@contextmanager
def _editing(path: Path) -> Iterator[None]:
    """Holds the lock of a file of keys, so that two commands at once do not undo each other."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock"), mode=0o600):
            yield
    except OSError as e:
        raise ConfigError("keys", path, e.strerror or str(e), "check the path") from e


def _write(path: Path, keys: Sequence[Key]) -> None:
    """Replaces the file in one step, readable only by its owner."""
    entries = [dataclasses.asdict(key) | {"limits": _given(key.limits)} for key in keys]
    write_file(path, json.dumps(entries, indent=2) + "\n", mode=0o600)
