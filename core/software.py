"""The software that all machines of a run must have in common, without importing it."""

import hashlib
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata

from core.process.python import ROOT

CODE = "spotforge's code"
_OURS = ("core", "monitoring", "parallel", "trainer", "compression", "serving", "launch")
_PACKAGES = ("torch", "transformers", "tokenizers", "deepspeed", "numpy")


def software() -> dict[str, str]:
    """Returns the versions of our code (a digest), of Python and of the installed packages."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {CODE: code_digest()[:12], "Python": python, **installed_versions(_PACKAGES)}


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed; imports none of them."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """Returns the SHA-256 of the names and contents of our modules."""
    digest = hashlib.sha256()
    for path in sorted(path for name in _OURS for path in (ROOT / name).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def difference(found: Mapping[str, str], expected: Mapping[str, str]) -> tuple[str, str] | None:
    """Returns in words what differs, as `torch 2.12.0` and `torch 2.13.0`; None if nothing does."""
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if not names:
        return None
    return _words(found, names), _words(expected, names)


def _words(versions: Mapping[str, str], names: list[str]) -> str:
    has = (f"{name} {versions[name]}" if name in versions else f"no {name}" for name in names)
    return ", ".join(has)
