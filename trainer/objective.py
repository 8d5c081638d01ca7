"""Next-token prediction: the model and its loss in one module.

Shapes: B sequences of T tokens, N = B x T, H hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monitoring.errors import ConfigError
from trainer.data.loader import IGNORE_INDEX

# Logits held at once, in elements: they stay in the cache of a CPU, and keep a GPU busy.
_CHUNK_NUMEL = {"cpu": 2**22, "cuda": 2**26}

# Fields of a transformers config by which a model does more to its logits than a matrix product.
_LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class NextTokenLoss(nn.Module):
    """Summed cross-entropy of a Hugging Face causal LM on packed samples.

    Head and loss are inside forward so that a strategy which gathers parameters around forward has
    the head's weight there.
    """

    def __init__(self, model: nn.Module, fused: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.fused = fused
        if fused:
            _check_plain_logits(self.model)

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
            The loss summed over targets, a float32 scalar; or (B, V) logits after the last
            position.
        """
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if targets is None:
            last: Tensor = self.model(**inputs, logits_to_keep=1).logits[:, -1]  # (B, V)
            return last
        if not self.fused:
            logits = self.model(**inputs).logits.float()  # (B, T, V)
            return F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
        hidden = self.model.base_model(**inputs).last_hidden_state.flatten(0, 1)  # (N, H)
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return fused_linear_cross_entropy(hidden, weight, bias, targets.flatten())


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
        wants = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if any(wants) else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows in _chunks(hidden, weight):
            chunk, target = hidden[rows], targets[rows]
            logits = F.linear(chunk, weight, bias).float()  # (n, V)
            counted = target != IGNORE_INDEX
            index = target.clamp_min(0).unsqueeze(1)  # (n, 1)
            log_norm = logits.logsumexp(1, keepdim=True)
            losses = (log_norm - logits.gather(1, index)).squeeze(1)
            total += losses.masked_fill_(~counted, 0.0).sum()
            if grad_hidden is None:
                continue
            grad = logits.sub_(log_norm).exp_()  # softmax, in the logits' memory
            grad.scatter_add_(1, index, -torch.ones_like(log_norm))
            grad.mul_(counted.unsqueeze(1))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if grad.dtype is torch.float32:
                    grad_weight.addmm_(grad.T, chunk)
                else:
                    grad_weight += grad.T @ chunk
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grads, ctx.grads = ctx.grads, ()  # used once: scaled in place
        return *(None if g is None else g.mul_(scale) for g in grads), None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_NUMEL.get(hidden.device.type, 2**22) // weight.shape[0])
    return [slice(i, i + rows) for i in range(0, hidden.shape[0], rows)]


def _check_plain_logits(model: Any) -> None:
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
