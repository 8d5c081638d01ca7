"""What is trained for: the model and its loss in one module. Here: next-token prediction.

Shapes: B sequences of T tokens, N = B x T, H hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monitoring.errors import ConfigError
from parallel.strategy import Materialize
from trainer.data.loader import IGNORE_INDEX

# Logits held at once, in elements: they stay in the cache of a CPU, and keep a GPU busy.
_CHUNK_NUMEL = {"cpu": 2**22, "cuda": 2**26}

# Fields of a transformers config by which a model does more to its logits than a matrix product.
_LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class Objective(nn.Module, ABC):
    """A Hugging Face causal LM, `model`, and the loss that it is trained for.

    Head and loss are inside forward so that a strategy which gathers parameters around forward has
    the head's weight there.

    Attributes:
        parts: What the loss of the last forward in training is made of, by the name of its metric:
            sums over targets, float32 scalars without a gradient. Empty where it is of one piece.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.parts: dict[str, Tensor] = {}

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Loss, or the next token's logits where there are no targets.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64; IGNORE_INDEX bears no loss.
            position_ids: (B, T) int64, restarting at 0 with each document; None counts up.

        Returns:
            The loss summed over targets, a float32 scalar: the objective's in training, plain
            cross-entropy in evaluation, so that objectives compare; or (B, V) logits after the last
            position.
        """

    @abstractmethod
    def materializer(self, model: Materialize, device: torch.device) -> Materialize:
        """What fills all of this module part by part, given what fills the parts of `model`."""


class NextTokenLoss(Objective):
    """Summed cross-entropy on packed samples."""

    def __init__(self, model: nn.Module, fused: bool) -> None:
        super().__init__(model)
        self.fused = fused
        if fused:
            check_plain_logits(self.model)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        return next_token(self.model, self.fused, input_ids, targets, position_ids)

    def materializer(self, model: Materialize, device: torch.device) -> Materialize:
        return model


def next_token(
    model: Any,
    fused: bool,
    input_ids: Tensor,
    targets: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """Summed cross-entropy, or logits after the last position: as `Objective.forward` says."""
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    if targets is None:
        last: Tensor = model(**inputs, logits_to_keep=1).logits[:, -1]  # (B, V)
        return last
    if not fused:
        logits = model(**inputs).logits.float()  # (B, T, V)
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
    hidden, weight, bias = hidden_and_head(model, input_ids, position_ids)
    return fused_linear_cross_entropy(hidden, weight, bias, targets.flatten())


def hidden_and_head(
    model: Any, input_ids: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What logits are the product of: (N, H) hidden states, the head's (V, H) weight, its bias.

    The first two are of autocast's type where it is on.
    """
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)  # (N, H)
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
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


def check_plain_logits(model: Any) -> None:
    """Raises ConfigError for a model whose logits are no product of hidden states and head."""
    for field in _LOGIT_FIELDS:
        value = getattr(model.config, field, None)
        if value not in (None, 1, 1.0):
            raise ConfigError(
                "model.fused_loss",
                True,
                f"{type(model).__name__} transforms its logits ({field}={value}), which the fused "
                "loss leaves out",
                "set model.fused_loss=false",
            )
