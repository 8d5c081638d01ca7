"""Families and columns of the table, and where their files are. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

TRAINING = ("loss", "ddp", "fsdp", "zero", "export")
COMPRESSION = ("int8", "gptq")
SERVING = ("serve",)
COLUMNS = (*TRAINING, *COMPRESSION, *SERVING)


@dataclass(frozen=True)
class Places:
    """Where a family's files are.

    Attributes:
        root: Of all families.
        family: Its name.
    """

    root: Path
    family: str

    @property
    def model(self) -> Path:
        """What transformers saved."""
        return self.root / self.family / "model"

    @property
    def reference(self) -> Path:
        """State after two steps of the plain loop."""
        return self.root / self.family / "reference.pt"

    def run(self, column: str) -> Path:
        """What the product made for a column."""
        return self.root / self.family / column
