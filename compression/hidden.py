"""What flows between two blocks, on disk: memory holds one batch of it.

Shapes: N sequences of T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.folder import staged_file

TOKENS_AT_ONCE = 2048


class Hidden:
    """A file of float32 (N, T, H), written once and read in order.

    Args:
        path: It is there only when it is whole.
        shape: (N, T, H).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape

    @property
    def rows(self) -> int:
        """Sequences in a batch."""
        return max(1, TOKENS_AT_ONCE // self.shape[1])

    def batches(self) -> Iterator[Tensor]:
        """One batch after another: (B, T, H)."""
        count = self.shape[1] * self.shape[2]
        with self.path.open("rb") as file:
            for _ in range(0, self.shape[0], self.rows):
                values = np.fromfile(file, np.float32, self.rows * count)
                yield torch.from_numpy(values).view(-1, *self.shape[1:])

    def write(self, batches: Iterator[Tensor]) -> None:
        """Makes the file of its batches; an interrupted one is not there."""
        with staged_file(self.path) as staging, staging.open("wb") as file:
            for batch in batches:
                file.write(batch.contiguous().numpy().tobytes())

    def map(self, function: Callable[[Tensor], Tensor], path: Path) -> Hidden:
        """The file that a function of each batch makes."""
        result = Hidden(path, self.shape)
        result.write(function(batch) for batch in self.batches())
        return result


def embed(
    input_ids: Tensor, function: Callable[[Tensor], Tensor], path: Path, width: int
) -> Hidden:
    """The hidden states that a model's embedding makes of token ids (N, T).

    Args:
        input_ids: int64.
        function: (B, T) -> (B, T, H).
        path: Of the file.
        width: H.
    """
    result = Hidden(path, (*input_ids.shape, width))
    result.write(
        function(input_ids[i : i + result.rows]) for i in range(0, len(input_ids), result.rows)
    )
    return result
