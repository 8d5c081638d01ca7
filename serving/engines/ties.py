"""Ties: choices between experts with nearly equal scores, which rounding decides.

An engine and a plain forward that round differently may select different experts there, and both
are right. So a forward records such choices and makes the other one where it is told to. What is
compared stays a whole computation of the model, and the bounds need not be wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from serving.engine import Tie

_TOPK = (torch.topk, torch.Tensor.topk)  # every router of transformers selects experts by these
# Largest gap of a tie, relative to the largest score. Different computations of deep models in
# float32 differ by some 1e-5.
_NEAR = 1e-4


class Choices(TorchFunctionMode):
    """Records ties in everything that is computed within the context, and turns some of them.

    Args:
        turned: Ties that are decided the other way.
    """

    def __init__(self, turned: Iterable[Tie] = ()) -> None:
        super().__init__()
        self._turned = set(turned)
        self._calls = 0
        self._near: list[tuple[float, Tie]] = []

    @property
    def ties(self) -> list[Tie]:
        """Ties that were found, the closest first."""
        return [tie for _, tie in sorted(self._near)]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        return self._look(found, *args, **(kwargs or {})) if func in _TOPK else found

    def _look(
        self,
        found: Any,
        input: torch.Tensor,
        k: int,
        dim: int = -1,
        largest: bool = True,
        sorted: bool = True,
    ) -> Any:
        """Compares the last selected score of each row with the first that was left out.

        Returns the result of `topk`, with the two exchanged in the rows that are turned.
        """
        call, self._calls = self._calls, self._calls + 1
        is_of_rows = dim in (-1, input.ndim - 1) and largest and input.is_floating_point()
        if not is_of_rows or not 0 < k < input.shape[-1]:
            return found
        rows = input.reshape(-1, input.shape[-1])
        values, indices = (part.reshape(-1, k).clone() for part in found)
        left_out = rows.scatter(-1, indices, -math.inf).max(-1)
        taken = values.min(-1)
        gap = (taken.values - left_out.values) / values.abs().amax(-1)
        # Scores that are -inf on both sides have a gap of NaN, which is not a tie.
        for row in (gap <= _NEAR).nonzero().flatten().tolist():
            tie = (call, row)
            self._near.append((gap[row].item(), tie))
            if tie in self._turned:
                place = taken.indices[row]
                values[row, place] = left_out.values[row]
                indices[row, place] = left_out.indices[row]
        shape = found.indices.shape
        return torch.return_types.topk((values.view(shape), indices.view(shape)))
