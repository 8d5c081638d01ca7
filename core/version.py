"""Which spotforge this is: the package's version, and the commit of a checkout."""

import subprocess
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def version() -> str:
    """Returns the version, with the commit where it is known: `0.1.0 (commit 1a2b3c4)`."""
    try:
        number = metadata.version("spotforge")
    except metadata.PackageNotFoundError:  # a mere checkout
        number = "not installed"
    state = checkout(_ROOT)
    if state is None:
        return number
    changed = ", changed since" if state["dirty"] else ""
    return f"{number} (commit {str(state['commit'])[:12]}{changed})"


def checkout(root: Path = _ROOT) -> dict[str, object] | None:
    """Returns `commit` and `dirty` of a source tree, or None where it is no checkout of its own.

    An installed package may lie in a virtual environment inside somebody else's repository; that
    repository's commit says nothing about us.
    """
    top = _run_git(root, "rev-parse", "--show-toplevel")
    commit = _run_git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root:
        return None
    return {"commit": commit, "dirty": _run_git(root, "status", "--porcelain") != ""}


def _run_git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
