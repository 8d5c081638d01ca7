"""JSON files that people hand to the launcher."""

import json
from pathlib import Path
from typing import Any

from core.errors import ConfigError


def read_json(key: str, path: Path, fix: str) -> Any:
    """What is in a file.

    Args:
        key: Of the setting that names it, for the error.
        path: The file.
        fix: What to give instead of one that is not JSON.

    Raises:
        ConfigError: It cannot be read, or is not JSON.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for whoever writes to it
        raise ConfigError(key, path, "is no file", fix)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(key, path, e.strerror or str(e), "check the path") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(key, path, f"is not JSON ({e})", fix) from e
