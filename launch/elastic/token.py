"""The token that the machines of a run share, and the proofs that both sides have it.

The token itself is never sent. The supervisor sends a random challenge, the machine answers with an
HMAC of it (RFC 2104, SHA-256) and a challenge of its own, and the supervisor answers that one, so
that a stranger can neither join nor pose as the supervisor. What follows is not encrypted.
"""

import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from core.errors import ConfigError
from parallel.launcher import TOKEN_VARIABLE

OPTION = "--token-file"
# A proof can be recorded, and tokens tried against it elsewhere.
_MIN_CHARS = 16


def read_token(
    path: Path | None, environment: Mapping[str, str] = os.environ, makes: bool = False
) -> str | None:
    """Returns the token that the user gave in a file or in the variable.

    Args:
        path: Value of `--token-file`.
        environment: Variables of this process.
        makes: True: a file that does not exist is made, with a new token, unless the variable is
            set.

    Returns:
        The token, without white space at its ends; None if none is given.

    Raises:
        ConfigError: The file cannot be read or made, the token is too short, or both are given and
            differ.
    """
    given = environment.get(TOKEN_VARIABLE, "").strip()
    if path is None:
        return _checked(TOKEN_VARIABLE, "...", given) if given else None
    try:
        if makes and not given and not path.exists():
            # Created with these rights: a later chmod would leave a moment in which all can read.
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(new_token() + "\n")
        token = _checked(OPTION, str(path), path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not text of ASCII characters"
        rule, fix = f"cannot be read or made: {reason}", "name a file with the token in it"
        raise ConfigError(OPTION, path, rule, fix) from e
    if given not in ("", token):
        rule = f"has another token than {TOKEN_VARIABLE}"
        raise ConfigError(OPTION, path, rule, "give one of the two")
    return token


def new_token() -> str:
    """Returns a random token of 192 bits."""
    return secrets.token_urlsafe(24)


def new_challenge() -> str:
    """Returns a random challenge of 128 bits."""
    return secrets.token_hex(16)


def proof_of(token: str | None, role: str, *parts: object) -> str:
    """Returns the proof that its sender has the token; empty without one.

    Args:
        token: The shared token.
        role: Sender's role, so that neither side's proof serves as the other's.
        parts: Both challenges, and what the sender says of itself.
    """
    if token is None:
        return ""
    text = "\n".join(map(str, (role, *parts)))
    return hmac.digest(token.encode(), _bytes_of(text), "sha256").hex()


def is_proof(given: str, token: str | None, role: str, *parts: object) -> bool:
    """Returns whether a proof is right; without a token every proof is."""
    expected = proof_of(token, role, *parts)
    return token is None or hmac.compare_digest(_bytes_of(given), _bytes_of(expected))


def _bytes_of(text: str) -> bytes:
    # A stranger may send half of a surrogate pair, which UTF-8 cannot encode.
    return text.encode(errors="backslashreplace")


def _checked(key: str, shown: str, token: str) -> str:
    if len(token) < _MIN_CHARS:
        rule = f"its token has {len(token)} characters, and must have {_MIN_CHARS} or more"
        raise ConfigError(key, shown, rule, "let `launch supervise` make one")
    return token
