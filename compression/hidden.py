"""Hidden states between two blocks, kept on disk: memory holds one batch of them.

Shapes: N sequences of T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.folder import staged_file

TOKENS_AT_ONCE = 2048  # tokens of a batch


class Hidden:
    """A file of float32 hidden states (N, T, H), written once and read in order.

    Args:
        path: File, which exists only when it is complete.
        shape: Shape (N, T, H) of the hidden states.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape

    @property
    def rows(self) -> int:
        """Number of sequences in a batch."""
        return max(1, TOKENS_AT_ONCE // self.shape[1])

    def batches(self) -> Iterator[Tensor]:
        """Yields one batch after another: (B, T, H)."""
        count = self.shape[1] * self.shape[2]
        with self.path.open("rb") as file:
            for _ in range(0, self.shape[0], self.rows):
                values = np.fromfile(file, np.float32, self.rows * count)
                yield torch.from_numpy(values).view(-1, *self.shape[1:])

    def write(self, batches: Iterator[Tensor]) -> None:
        """Writes the file from batches; an interrupted write leaves no file."""
        with staged_file(self.path) as staging, staging.open("wb") as file:
            for batch in batches:
                file.write(batch.contiguous().numpy().tobytes())

    def map(self, function: Callable[[Tensor], Tensor], path: Path) -> Hidden:
        """Writes a function's results for all batches to another file, and returns it."""
        result = Hidden(path, self.shape)
        result.write(function(batch) for batch in self.batches())
        return result


def embed(
    input_ids: Tensor, function: Callable[[Tensor], Tensor], path: Path, width: int
) -> Hidden:
    """Returns the hidden states that a model's embedding makes of token ids.

    Args:
        input_ids: Token ids (N, T) int64.
        function: Function that embeds token ids: (B, T) -> (B, T, H).
        path: File to write.
        width: Hidden size H.
    """
    result = Hidden(path, (*input_ids.shape, width))
    result.write(
        function(input_ids[i : i + result.rows]) for i in range(0, len(input_ids), result.rows)
    )
    return result
