"""Round to nearest: needs neither data nor a search; the baseline of all other methods."""

from __future__ import annotations

from dataclasses import dataclass

from compression.block import Block
from compression.quantizer import fit_grid
from compression.scheme import Scheme


@dataclass(frozen=True)
class RoundToNearest:
    """Replaces each weight by the nearest value of a grid that spans its group.

    Attributes:
        scheme: Scheme of the grid.
    """

    scheme: Scheme
    needs_data = False

    def apply(self, block: Block) -> None:
        """Quantizes the block's layers in place."""
        for name, layer in block.layers.items():
            weight = layer.weight.data
            block.put(name, fit_grid(weight, self.scheme, block.scale_dtype).quantize(weight))
