"""What is trained for: the model and its loss in one module. Here: next-token prediction.

Shapes: B sequences of T tokens, N = B x T, H hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.strategy import Materialize
from trainer.data.loader import IGNORE_INDEX

# Logits held at once, in elements: they stay in the cache of a CPU, and keep a GPU busy.
_CHUNK_NUMEL = {"cpu": 2**22, "cuda": 2**26}


class Objective(nn.Module, ABC):
    """A Hugging Face causal LM, `model`, and the loss that it is trained for.

    Head and loss are inside forward so that a strategy which gathers parameters around forward has
    the head's weight there. `trainer/probe.py` finds out what the model at hand needs.

    Attributes:
        fused: Whether head and loss are computed together; else transformers computes the logits.
        auxiliary: Whether the model's own loss (routers out of balance, z-loss) is added.
        apart: Whether the documents of a sample are to be given in rows of their own.
        parts: What the loss of the last forward in training is made of, by the name of its metric:
            sums over targets, float32 scalars without a gradient. Empty where it is of one piece.
    """

    def __init__(self, model: nn.Module, fused: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.fused, self.auxiliary, self.apart = fused, False, False
        self.parts: dict[str, Tensor] = {}

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Loss, or the next token's logits where there are no targets.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64; IGNORE_INDEX bears no loss.
            position_ids: (B, T) int64, restarting at 0 with each document; None counts up.
            attention_mask: (B, T) int64, 0 for padding at the end of a row; None: there is none.

        Returns:
            The loss summed over targets, a float32 scalar: the objective's in training, plain
            cross-entropy in evaluation, so that objectives compare; or (B, V) logits after the last
            position.
        """

    @abstractmethod
    def materializer(self, model: Materialize, device: torch.device) -> Materialize:
        """What fills all of this module part by part, given what fills the parts of `model`."""

    def states(
        self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the loss is made of, and the model's own loss.

        Returns:
            (N, H) hidden states that the head makes logits of where the loss is fused, else (N, V)
            logits; and the auxiliary loss, a scalar mean, or None where it is not wanted.
        """
        inputs = model_inputs(input_ids, position_ids)
        if not (self.training and self.auxiliary):
            return outputs_of(self.model, self.fused, inputs).flatten(0, 1), None
        if attention_mask is not None:
            # No document is changed by what comes after it, but routers would be told to balance
            # padding, too.
            inputs["attention_mask"] = attention_mask
        outputs, auxiliary = outputs_and_own_loss(self.model, self.fused, inputs)
        return outputs.flatten(0, 1), auxiliary


class NextTokenLoss(Objective):
    """Summed cross-entropy on packed samples, and the model's auxiliary loss if it has one."""

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if targets is None:
            return next_logits(self.model, input_ids)
        states, auxiliary = self.states(input_ids, position_ids, attention_mask)
        entropy = cross_entropy_sum(self.model, self.fused, states, targets)
        if auxiliary is None:
            return entropy
        auxiliary = over_targets(auxiliary, targets)
        self.parts = {"cross_entropy": entropy.detach(), "auxiliary_loss": auxiliary.detach()}
        return entropy + auxiliary

    def materializer(self, model: Materialize, device: torch.device) -> Materialize:
        return model


def model_inputs(input_ids: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
    """Arguments of a model's forward."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return inputs


def next_logits(model: Any, input_ids: Tensor) -> Tensor:
    """(B, V) logits after the last position."""
    logits: Tensor = model(**model_inputs(input_ids, None), logits_to_keep=1).logits[:, -1]
    return logits


def outputs_of(model: Any, hidden: bool, inputs: dict[str, Any]) -> Tensor:
    """(B, T, H) hidden states that the head makes logits of, or (B, T, V) logits."""
    outputs: Tensor = (
        model.base_model(**inputs).last_hidden_state if hidden else model(**inputs).logits
    )
    return outputs


def outputs_and_own_loss(model: Any, hidden: bool, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """As `outputs_of`, and what the model adds to cross-entropy where it is given labels.

    That is the auxiliary loss as each family of transformers defines it, times its coefficient; 0
    where a family or its config wants none. Hidden states are those that the head was given, which
    made the logits of one position of them only.
    """
    given: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(args[0])
        return (args[0][:, -1:],)

    with _without_cross_entropy(model):
        if not hidden:
            outputs = model(**inputs, labels=inputs["input_ids"])
            return outputs.logits, outputs.loss
        with model.get_output_embeddings().register_forward_pre_hook(keep):
            outputs = model(**inputs, labels=inputs["input_ids"])
    (states,) = given
    return states, outputs.loss


@contextmanager
def _without_cross_entropy(model: Any) -> Iterator[None]:
    """Has a model that is given labels return a loss of what it adds to cross-entropy only."""
    own = model.loss_function
    model.loss_function = _nothing
    try:
        yield
    finally:
        model.loss_function = own


def _nothing(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_zeros((), dtype=torch.float32)  # a new one: models add to it in place


def over_targets(mean: Tensor, targets: Tensor) -> Tensor:
    """A mean over a micro-batch, weighted by the targets (B, T) in it: a sum, as the loss is."""
    return mean.float() * (targets != IGNORE_INDEX).sum()


def cross_entropy_sum(model: Any, fused: bool, states: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy, a float32 scalar.

    Args:
        model: Whose head it is.
        fused: What `states` are.
        states: (N, H) hidden states, or (N, V) logits.
        targets: (B, T) int64 with IGNORE_INDEX.
    """
    if fused:
        return fused_linear_cross_entropy(*with_head(model, states), targets.flatten())
    return F.cross_entropy(
        states.float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def with_head(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What logits are the product of: (N, H) hidden states, the head's (V, H) weight, its bias.

    The first two are of autocast's type where it is on.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden, weight, bias


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, targets, reduction="sum")`, a few rows at a time.

    Gradients are made in forward while a chunk's logits are at hand (as Liger-Kernel does,
    arXiv 2410.10989), so nothing of size N x V is stored and nothing is computed twice. The scale
    of the incoming gradient is applied in backward.

    Args:
        hidden: (N, H).
        weight: (V, H), of the dtype of `hidden`.
        bias: (V) or None.
        targets: (N) int64 with IGNORE_INDEX.

    Returns:
        float32 scalar.
    """
    loss: Tensor = _FusedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets
    )
    return loss


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        grads = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows in chunks(hidden, weight):
            target = targets[rows]
            logits = F.linear(hidden[rows], weight, bias).float()  # (n, V)
            counted = target != IGNORE_INDEX
            index = target.clamp_min(0).unsqueeze(1)  # (n, 1)
            log_norm = logits.logsumexp(1, keepdim=True)
            losses = (log_norm - logits.gather(1, index)).squeeze(1)
            total += losses.masked_fill_(~counted, 0.0).sum()
            if not grads.wanted:
                continue
            grad = logits.sub_(log_norm).exp_()  # softmax, in the logits' memory
            grad.scatter_add_(1, index, -torch.ones_like(log_norm))
            grads.add(rows, grad.mul_(counted.unsqueeze(1)))
        ctx.grads = grads.finish()
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grads, ctx.grads = ctx.grads, ()  # used once: scaled in place
        return *(None if g is None else g.mul_(scale) for g in grads), None


class HeadGradients:
    """Gradients of hidden states and head, added up chunk by chunk from those of the logits.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V) or None.
        wants: Which of the three need one, first.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: tuple[bool, ...]
    ) -> None:
        self.wanted = any(wants[:3])
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._of_hidden = torch.empty_like(hidden) if self.wanted else None
        self._of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        self._of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)

    def add(self, rows: slice, grad: Tensor) -> None:
        """Counts a chunk, of whose logits `grad` (n, V), float32, is the gradient."""
        if self._of_bias is not None:
            self._of_bias += grad.sum(0)
        grad = grad.to(self._hidden.dtype)
        chunk = self._hidden[rows]
        assert self._of_hidden is not None
        torch.mm(grad, self._weight, out=self._of_hidden[rows])
        if self._of_weight is not None:
            if grad.dtype is torch.float32:
                self._of_weight.addmm_(grad.T, chunk)
            else:
                self._of_weight += grad.T @ chunk

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of hidden states, weight and bias, in their types."""
        weight, bias = self._of_weight, self._of_bias
        return (
            self._of_hidden,
            None if weight is None else weight.to(self._weight.dtype),
            None if bias is None or self._bias is None else bias.to(self._bias.dtype),
        )


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Rows of which the logits are held at once."""
    rows = max(1, _CHUNK_NUMEL.get(hidden.device.type, 2**22) // weight.shape[0])
    return [slice(i, i + rows) for i in range(0, hidden.shape[0], rows)]
