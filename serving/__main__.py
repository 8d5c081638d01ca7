"""Entry point: composes the settings and serves until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from core.errors import ConfigError, ExitCode
from core.settings.command import Job, refuse_repeated
from serving.command import SERVING
from serving.config import ServingConfig


def _run(config: ServingConfig, job: Job) -> int:
    # Imported here so that --help and refused settings do not wait for uvicorn and FastAPI.
    from serving.server import serve

    # WARNING for libraries, whose INFO lines (one a request) would drown ours.
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("spotforge.serving").setLevel(logging.INFO)
    asyncio.run(serve(config))
    return ExitCode.FINISHED


def main() -> int:
    """Runs the command that the arguments name; returns the exit code."""
    if sys.argv[1:2] == ["key"] and not {"-h", "--help"} & set(sys.argv):
        try:
            return _key_command(sys.argv[2:])
        except ConfigError as e:
            print(e, file=sys.stderr)
            return e.exit_code
    return SERVING.main(_run)


def _key_command(words: list[str]) -> int:
    """Runs `key create NAME [name=value ...]`, `key revoke NAME` or `key list`.

    Each takes `keys=FILE`.
    """
    from serving import keys

    refuse_repeated([word for word in words if "=" in word])
    files = [word.removeprefix("keys=") for word in words if word.startswith("keys=")]
    path = Path(files[0] if files else "keys.json").expanduser()
    match [word for word in words if not word.startswith("keys=")]:
        case ["create", name, *settings]:
            return keys.create_command(path, name, settings)
        case ["revoke", name]:
            return keys.revoke_command(path, name)
        case ["list"]:
            return keys.list_command(path)
    fix = "use key create NAME [name=value ...] | key revoke NAME | key list [keys=FILE]"
    raise ConfigError("key", " ".join(words), "is not a command", fix)


if __name__ == "__main__":
    sys.exit(main())
