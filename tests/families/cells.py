"""What was found of each family in each column; kept in a file, so that a stopped run goes on."""

import hashlib
import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

_PACKAGES = ("compression", "configs", "launch", "monitoring", "parallel", "serving", "trainer")


@dataclass(frozen=True)
class Cell:
    """One family in one column.

    Attributes:
        state: `ok`, `refused` or `wrong`.
        said: The line of a refusal, what is wrong, or what an `ok` took; else empty.
        seconds: That it took.
    """

    state: str
    said: str
    seconds: float


class Cells:
    """All that were found with the product as it is now.

    Args:
        path: Of the file; what it holds of another state of the product is forgotten.
        project: Folder of the product.
    """

    def __init__(self, path: Path, project: Path) -> None:
        self._path, self._stamp = path, _stamp(project)
        self._lock = threading.Lock()
        self._cells: dict[str, Cell] = {}
        if path.exists():
            saved = json.loads(path.read_text())
            if saved["stamp"] == self._stamp:
                self._cells = {key: Cell(**cell) for key, cell in saved["cells"].items()}

    def get(self, family: str, column: str) -> Cell | None:
        """What was found; None: nothing yet."""
        return self._cells.get(f"{family} {column}")

    def put(self, family: str, column: str, cell: Cell) -> None:
        """Keeps what was found, from any thread."""
        with self._lock:
            self._cells[f"{family} {column}"] = cell
            described = {key: asdict(cell) for key, cell in self._cells.items()}
            text = json.dumps({"stamp": self._stamp, "cells": described}, indent=1) + "\n"
            self._path.write_text(text)


def _stamp(project: Path) -> str:
    """Digest of the product's source and of what judges it."""
    folders = [*(project / name for name in _PACKAGES), Path(__file__).parent]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.yaml"))):
            digest.update(path.read_bytes())
    return digest.hexdigest()
