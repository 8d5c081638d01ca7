"""`docs/models.md`: the table, for people."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from tests.families.cells import Cell

_LIBRARIES = ("transformers", "torch", "deepspeed", "compressed-tensors")
_WORDS = {"ok": "ok", "refused": "refused", "wrong": "**WRONG**"}

_PAGE = Path(__file__).with_suffix(".md")


def write_page(
    path: Path, found: Mapping[str, Mapping[str, Cell | None]], features: Mapping[str, str]
) -> None:
    """Writes the page.

    Args:
        path: Of the page.
        found: Cell of each column, by family.
        features: What is special about each family.
    """
    columns = list(next(iter(found.values())))
    notes: dict[str, int] = {}
    lines = [
        f"| family | what is special | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for family, row in found.items():
        cells = " | ".join(_cell(cell, notes) for cell in row.values())
        lines.append(f"| {family} | {features[family]} | {cells} |")
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    page = _PAGE.read_text().format(
        versions=f"Python {platform.python_version()}, {libraries}",
        table="\n".join(lines),
        notes="\n".join(f"{number}. {said}" for said, number in notes.items()) or "None.",
    )
    path.write_text(page)


def _cell(cell: Cell | None, notes: dict[str, int]) -> str:
    if cell is None:
        return "not measured"
    if not cell.said:
        return _WORDS[cell.state]
    number = notes.setdefault(f"`{cell.said.replace('`', chr(39))}`", len(notes) + 1)
    return f"{_WORDS[cell.state]} <sup>{number}</sup>"
