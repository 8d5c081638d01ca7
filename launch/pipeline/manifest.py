"""The digests of what one stage hands to the next."""

import hashlib
from pathlib import Path

Manifest = dict[str, str]


def manifest_of(path: Path) -> Manifest:
    """The sha256 of every file, by its path in the folder; of a single file, by its name.

    Args:
        path: A folder, or a file; one that is absent has no files.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    return {str(file.relative_to(root)): _sha256(file) for file in files if file.exists()}


def first_difference(was: Manifest, now: Manifest) -> str | None:
    """The first file that was changed, removed or added, and which of these it was."""
    for name in sorted(was.keys() | now.keys()):
        if name not in now:
            return f"{name} is gone"
        if name not in was:
            return f"{name} was added"
        if was[name] != now[name]:
            return f"{name} was changed"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
