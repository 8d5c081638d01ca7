"""The table of families: what every column makes of every family, beside stock transformers.

    python -m tests.families                   all that was not measured since the product changed,
                                               then docs/models.md
    python -m tests.families gemma2 serve int8 these families and columns, again; no page

It works in `build/families`, and exits with 1 where a cell is wrong.
"""

import sys
from pathlib import Path

from tests.families.cells import Cells
from tests.families.page import write_page
from tests.families.places import COLUMNS
from tests.families.table import measure, prepare

PROJECT = Path(__file__).parents[2]


def main(words: list[str]) -> int:
    """Measures, and writes the page; returns the exit code."""
    root = PROJECT / "build" / "families"
    features = prepare(root, [word for word in words if word not in COLUMNS])
    if unknown := sorted(set(words) - {*features, *COLUMNS}):
        print(f"{unknown[0]}: is no family and no column", file=sys.stderr)
        return 2
    families = [name for name in features if name in words] or list(features)
    columns = [name for name in COLUMNS if name in words] or list(COLUMNS)
    cells = Cells(root / "cells.json", PROJECT)
    wanted = [
        (family, column)
        for family in families
        for column in columns
        if words or cells.get(family, column) is None
    ]
    measure(root, wanted, cells)
    found = {family: {c: cells.get(family, c) for c in columns} for family in families}
    wrong = [
        f"{family} {column}: {cell.said}"
        for family, row in found.items()
        for column, cell in row.items()
        if cell is not None and cell.state == "wrong"
    ]
    print(f"{len(wrong)} wrong", *wrong, sep="\n  ")
    if not words:
        write_page(PROJECT / "docs" / "models.md", found, features)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
