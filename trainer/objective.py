"""Objectives: a model with its loss in one module. This module has next-token prediction.

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
from trainer.data.batch import IGNORE_INDEX

# Number of logits held at once: they fit into a CPU's cache, and keep a GPU busy.
_CHUNK_NUMEL = {"cpu": 2**22, "cuda": 2**26}


class Objective(nn.Module, ABC):
    """Combines a Hugging Face causal LM, `model`, with the loss that it is trained on.

    Head and loss are inside forward, so that a strategy that gathers parameters around forward has
    the head's weight there. `trainer/probe.py` finds out what the given model needs.

    Attributes:
        fused: True if head and loss are computed together; otherwise transformers computes logits.
        auxiliary: True if the model's own loss (load balance of routers, z-loss) is added.
        apart: True if each document of a sample needs a row of its own.
        parts: Parts of the last training loss by the name of their metric: sums over targets, as
            float32 scalars without a gradient. Empty if the loss has only one part.
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
        """Returns the loss, or without targets the next token's logits.

        Args:
            input_ids: Token ids, (B, T) int64.
            targets: Next tokens, (B, T) int64; IGNORE_INDEX has no loss.
            position_ids: Positions, (B, T) int64, from 0 in each document; None counts up.
            attention_mask: Mask, (B, T) int64, 0 for padding at the end of a row; None: no padding.

        Returns:
            Loss summed over targets, a float32 scalar: the objective's loss in training, plain
            cross-entropy in evaluation, so that objectives can be compared; or (B, V) logits
            after the last position.
        """

    @abstractmethod
    def materialize_with(self, model: Materialize, device: torch.device) -> Materialize:
        """Returns a function that fills this module part by part, given one for `model`."""

    def states(
        self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the input of the loss, and the model's own loss.

        Returns:
            (N, H) hidden states, the head's input, if the loss is fused, otherwise (N, V) logits;
            and the auxiliary loss, a scalar mean, or None if it is not used.
        """
        inputs = model_inputs(input_ids, position_ids)
        if not (self.training and self.auxiliary):
            return outputs_of(self.model, self.fused, inputs).flatten(0, 1), None
        if attention_mask is not None:
            # Causal attention hides padding from the documents, but without a mask routers would
            # balance the padding too.
            inputs["attention_mask"] = attention_mask
        outputs, auxiliary = outputs_and_own_loss(self.model, self.fused, inputs)
        return outputs.flatten(0, 1), auxiliary


class NextTokenLoss(Objective):
    """Computes summed cross-entropy on packed samples, plus the model's auxiliary loss if any."""

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

    def materialize_with(self, model: Materialize, device: torch.device) -> Materialize:
        return model


def model_inputs(input_ids: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
    """Returns the arguments of a model's forward."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return inputs


def next_logits(model: Any, input_ids: Tensor) -> Tensor:
    """Returns the logits (B, V) after the last position."""
    logits: Tensor = model(**model_inputs(input_ids, None), logits_to_keep=1).logits[:, -1]
    return logits


def outputs_of(model: Any, hidden: bool, inputs: dict[str, Any]) -> Tensor:
    """Returns the head's input, (B, T, H) hidden states, or (B, T, V) logits."""
    outputs: Tensor = (
        model.base_model(**inputs).last_hidden_state if hidden else model(**inputs).logits
    )
    return outputs


def outputs_and_own_loss(model: Any, hidden: bool, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the same as `outputs_of`, and what the model adds to cross-entropy given labels.

    The addition is the auxiliary loss as each family of transformers defines it, times its
    coefficient, or 0 if the family or its config has none. Hidden states are taken from the input
    of the head, which is then given only one position, to save the other logits.
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
    """Makes a model that is given labels return only its additions to cross-entropy."""
    own = model.loss_function
    model.loss_function = _nothing
    try:
        yield
    finally:
        model.loss_function = own


def _nothing(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    # A new tensor each time, since models add to it in place.
    return logits.new_zeros((), dtype=torch.float32)


def over_targets(mean: Tensor, targets: Tensor) -> Tensor:
    """Returns a mean over a micro-batch times its number of targets (B, T): a sum like the loss."""
    return mean.float() * (targets != IGNORE_INDEX).sum()


def cross_entropy_sum(model: Any, fused: bool, states: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed cross-entropy, a float32 scalar.

    Args:
        model: Model whose head is used.
        fused: True if `states` are hidden states.
        states: Hidden states (N, H), or logits (N, V).
        targets: Next tokens, (B, T) int64 with IGNORE_INDEX.
    """
    if fused:
        return fused_linear_cross_entropy(*with_head(model, states), targets.flatten())
    return F.cross_entropy(
        states.float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def with_head(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the factors of the logits: hidden states (N, H), the head's weight (V, H), its bias.

    Under autocast the first two have autocast's type.
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
    """Returns `cross_entropy(hidden @ weight.T + bias, targets, reduction="sum")` in chunks.

    Gradients are computed in forward while a chunk's logits are in memory (as in Liger-Kernel,
    arXiv 2410.10989), so nothing of size N x V is stored and nothing is computed twice. Backward
    applies the scale of the incoming gradient.

    Args:
        hidden: Hidden states, (N, H).
        weight: Weight of the head, (V, H), in the type of `hidden`.
        bias: Bias of the head, (V), or None.
        targets: Next tokens, (N) int64 with IGNORE_INDEX.

    Returns:
        Loss, a float32 scalar.
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
            # The gradient of cross-entropy is softmax minus one at the target.
            grad = logits.sub_(log_norm).exp_()  # softmax, in the memory of the logits
            grad.scatter_add_(1, index, -torch.ones_like(log_norm))
            grads.add(rows, grad.mul_(counted.unsqueeze(1)))
        ctx.grads = grads.finish()
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grads, ctx.grads = ctx.grads, ()  # scaled in place, so they can be used only once
        return *(None if g is None else g.mul_(scale) for g in grads), None


class HeadGradients:
    """Accumulates gradients of hidden states and head from chunks of the logits' gradient.

    Args:
        hidden: Hidden states, (N, H).
        weight: Weight of the head, (V, H).
        bias: Bias of the head, (V), or None.
        wants: Flags, in this order, for the three that need a gradient.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: tuple[bool, ...]
    ) -> None:
        self.wanted = any(wants[:3])
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._of_hidden = torch.empty_like(hidden) if self.wanted else None
        # In float32, since adding many small chunks in bfloat16 would lose digits.
        self._of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        self._of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)

    def add(self, rows: slice, grad: Tensor) -> None:
        """Adds a chunk, given the gradient of its logits, (n, V) float32."""
        if self._of_bias is not None:
            self._of_bias += grad.sum(0)
        grad = grad.to(self._hidden.dtype)
        chunk = self._hidden[rows]
        assert self._of_hidden is not None
        torch.mm(grad, self._weight, out=self._of_hidden[rows])
        if self._of_weight is not None:
            # addmm_ needs equal types, so a bfloat16 product is added in a second step.
            if grad.dtype is torch.float32:
                self._of_weight.addmm_(grad.T, chunk)
            else:
                self._of_weight += grad.T @ chunk

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients of hidden states, weight and bias, in their types."""
        weight, bias = self._of_weight, self._of_bias
        return (
            self._of_hidden,
            None if weight is None else weight.to(self._weight.dtype),
            None if bias is None or self._bias is None else bias.to(self._bias.dtype),
        )


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Returns slices of rows whose logits are held at once."""
    # The larger the vocabulary, the fewer rows, so that chunks have about the same size.
    rows = max(1, _CHUNK_NUMEL.get(hidden.device.type, 2**22) // weight.shape[0])
    return [slice(i, i + rows) for i in range(0, hidden.shape[0], rows)]
