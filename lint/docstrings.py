"""Checks that docstrings stand by themselves: `python lint/docstrings.py [--count] [PACKAGE ...]`.

A docstring, and the line that describes an attribute or an argument, must not open with a word
that only makes sense after the name it belongs to: "Of the model.", "Likewise.", "Those of them
that are not ignored." A function's docstring opens with a verb ("Returns ...", "Raises ...").
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKED: tuple[str, ...] = ()  # packages that are whole; a new one is added here

# Words with which a fragment opens: what they refer to stands outside of the docstring.
_FRAGMENTS = frozenset(
    """
    according after also among and as at because before behind below beside but by during else for
    from if in instead into it its itself likewise neither nor of on or otherwise out per since so
    than that their them then these they this those through to under until what whatever when where
    whether which while who whoever whose why with within without
    """.split()
)
_ENTRY = re.compile(r"^    \*{0,2}(\w+)(?: \([^)]*\))?: (\S.*)$", re.MULTILINE)
_SECTION = re.compile(r"^(?:Args|Attributes):\n((?: .*\n?|\n)+)", re.MULTILINE)
_VERB = re.compile(r"[A-Z][a-z]+s(?:,| or)? |[A-Z][a-z]+s\b")


def faults_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of each docstring or description that is a fragment."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        line = getattr(node, "lineno", 1)
        first = text.split("\n")[0]
        if _is_fragment(first) or (_is_public_function(node) and not _opens_with_verb(first)):
            yield line, first
        for section in _SECTION.findall(text):
            for name, description in _ENTRY.findall(section):
                if _is_fragment(description):
                    yield line, f"{name}: {description}"


def _is_public_function(node: ast.AST) -> bool:
    """Returns whether a node is a function that others call; a property reads as an attribute."""
    return (
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not any("property" in ast.unparse(d) for d in node.decorator_list)
    )


def _is_fragment(text: str) -> bool:
    word = re.match(r"[A-Za-z]+", text)
    return word is not None and word[0].lower() in _FRAGMENTS


def _opens_with_verb(text: str) -> bool:
    """Returns whether a text opens with a verb; "See" sends the reader elsewhere, and may stay."""
    return text.startswith("See ") or _VERB.match(text) is not None


def main(words: list[str]) -> int:
    """Prints what is found; returns 1 where there is something."""
    packages = [word for word in words if not word.startswith("-")] or CHECKED
    found: Counter[str] = Counter()
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            for line, text in faults_of(path):
                found[package] += 1
                if "--count" not in words:
                    print(f"{path.relative_to(ROOT)}:{line}: not a sentence of its own: {text}")
    if "--count" in words:
        print(*(f"{package} {found[package]}" for package in packages), sep="\n")
    return int(found.total() > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
