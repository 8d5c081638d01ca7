"""Sets weights to zero by magnitude, Wanda or SparseGPT; the model keeps its shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.block import Block, watch_inputs
from compression.methods.gptq import inverse_factor
from compression.sparsity import Criterion, Pattern

_BLOCK = 128  # columns for which SparseGPT chooses zeros at once


@dataclass(frozen=True)
class Prune:
    """Sets a share of each layer's weights to zero.

    Attributes:
        criterion: Rule by which weights are chosen.
        sparsity: Share of the weights that become zero.
        pattern: Positions at which zeros may be.
        damping: Damping of the Gram matrix as in GPTQ, for SparseGPT.
    """

    criterion: Criterion
    sparsity: float
    pattern: Pattern
    damping: float

    @property
    def needs_data(self) -> bool:
        """True if the criterion needs the layers' inputs."""
        return self.criterion is not Criterion.magnitude

    def apply(self, block: Block) -> None:
        """Prunes the block's layers in place."""
        if self.criterion is Criterion.magnitude:
            for name in block.layers:
                self._by_magnitude(block, name)
            return
        unseen = set(block.layers)
        for inputs in watch_inputs(block):
            norm = inputs.gram.diagonal().sqrt()
            unseen -= set(inputs.names)
            for name in inputs.names:
                weight = block.layers[name].weight.data
                if self.criterion is Criterion.sparsegpt:
                    block.layers[name].weight.data = self._sparsegpt(weight, inputs.gram)
                    block.notes.setdefault(name, {})["sparsity"] = self.sparsity
                # Wanda: magnitude times the norm of the input, compared within each output.
                else:
                    self._keep(block, name, ~self._is_least(weight.abs() * norm, per_row=True))

        # An expert that no token reached has no inputs to judge by.
        for name in unseen:
            self._by_magnitude(block, name)

    def _by_magnitude(self, block: Block, name: str) -> None:
        score = block.layers[name].weight.data.abs()
        self._keep(block, name, ~self._is_least(score, per_row=False))

    def _keep(self, block: Block, name: str, mask: Tensor) -> None:
        block.layers[name].weight.data = block.layers[name].weight.data * mask
        block.notes.setdefault(name, {})["sparsity"] = self.sparsity

    def _is_least(self, score: Tensor, per_row: bool) -> Tensor:
        """Returns which weights have the lowest scores (O, I), in each row or in the matrix."""
        if self.pattern is not Pattern.unstructured:
            kept, size = self.pattern.kept_of
            grouped = score.unflatten(1, (-1, size))
            least = grouped.argsort(stable=True, dim=-1)[..., : size - kept]
            return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, least, True).flatten(1)
        rows = score if per_row else score.reshape(1, -1)
        least = rows.argsort(stable=True, dim=-1)[:, : int(rows.shape[1] * self.sparsity)]
        is_least = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, least, True)
        return is_least.view_as(score)

    def _sparsegpt(self, weight: Tensor, gram: Tensor) -> Tensor:
        """Prunes a matrix by SparseGPT (Frantar and Alistarh, arXiv 2301.00774).

        Later weights compensate for those that become zero. Wanda's choice is taken if the Gram
        matrix cannot be inverted.
        """
        inverse = inverse_factor(gram, self.damping)
        if inverse is None:
            score = weight.abs() * gram.diagonal().sqrt()
            return weight * ~self._is_least(score, per_row=True)
        left = weight.clone()
        num_inputs = weight.shape[1]
        for start in range(0, num_inputs, _BLOCK):
            stop = min(start + _BLOCK, num_inputs)
            diagonal = inverse.diagonal()[start:stop]
            goes = self._goes(left[:, start:stop], diagonal)
            errors = torch.empty(len(left), stop - start)
            for i in range(start, stop):
                if self.pattern is not Pattern.unstructured:
                    _, size = self.pattern.kept_of
                    # A pattern chooses run by run, on weights after the compensation so far.
                    if (i - start) % size == 0:
                        part = slice(i - start, i - start + size)
                        score = (left[:, i : i + size] / diagonal[part]).square()
                        goes[:, part] = self._is_least(score, per_row=True)
                error = left[:, i].masked_fill(~goes[:, i - start], 0.0) / inverse[i, i]
                left[:, i:stop] -= error.unsqueeze(1) * inverse[i, i:stop]
                left[:, i].masked_fill_(goes[:, i - start], 0.0)
                errors[:, i - start] = error
            left[:, stop:] -= errors @ inverse[start:stop, stop:]
        return left

    def _goes(self, weight: Tensor, diagonal: Tensor) -> Tensor:
        # Chosen here for the whole block at once, unless a pattern chooses run by run.
        if self.pattern is not Pattern.unstructured:
            return torch.zeros_like(weight, dtype=torch.bool)
        score = (weight / diagonal).square().flatten()
        least = score.argsort(stable=True)[: int(score.numel() * self.sparsity)]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(0, least, True).view_as(weight)
