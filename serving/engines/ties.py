"""Choices that rounding decides: of two experts with nearly the same score, a router takes one.

An engine and a plain forward that round otherwise may take different ones there, and both are
right. So a forward notes where that can be, and makes the other choice where it is told to: what is
compared stays a whole computation of the model, and no bound has to be wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from serving.engine import Tie

_TOPK = (torch.topk, torch.Tensor.topk)  # by which every router of transformers chooses
# Of the largest score. Deep models in float32 are some 1e-5 apart, whatever they compute it by.
_NEAR = 1e-4


class Choices(TorchFunctionMode):
    """Notes choices among nearly equals in what is computed meanwhile, and turns some.

    Args:
        turned: Where the other one is to be taken.
    """

    def __init__(self, turned: Iterable[Tie] = ()) -> None:
        super().__init__()
        self._turned = set(turned)
        self._calls = 0
        self._near: list[tuple[float, Tie]] = []

    @property
    def ties(self) -> list[Tie]:
        """Choices that could have been others, the nearest first."""
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
        """Of a row of scores, what was taken last and what was left out first."""
        call, self._calls = self._calls, self._calls + 1
        is_of_rows = dim in (-1, input.ndim - 1) and largest and input.is_floating_point()
        if not is_of_rows or not 0 < k < input.shape[-1]:
            return found
        rows = input.reshape(-1, input.shape[-1])
        values, indices = (part.reshape(-1, k).clone() for part in found)
        left_out = rows.scatter(-1, indices, -math.inf).max(-1)
        taken = values.min(-1)
        gap = (taken.values - left_out.values) / values.abs().amax(-1)
        for row in (gap <= _NEAR).nonzero().flatten().tolist():  # of scores left out, it is none
            tie = (call, row)
            self._near.append((gap[row].item(), tie))
            if tie in self._turned:
                place = taken.indices[row]
                values[row, place] = left_out.values[row]
                indices[row, place] = left_out.indices[row]
        shape = found.indices.shape
        return torch.return_types.topk((values.view(shape), indices.view(shape)))
