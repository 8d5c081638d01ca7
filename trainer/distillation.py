"""Distillation: the student is trained to match its teacher's distribution.

Shapes: B sequences of T tokens, N = B x T, H hidden size (the teacher has its own), V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.strategy import Materialize
from trainer.data.batch import IGNORE_INDEX
from trainer.objective import (
    HeadGradients,
    Objective,
    chunks,
    cross_entropy_sum,
    next_logits,
    over_targets,
    with_head,
)
from trainer.teacher import Teacher


class DistillationLoss(Objective):
    """Computes the weighted sum of divergence from the teacher and cross-entropy.

    It is weight * T^2 * KL(teacher || student) + (1 - weight) * cross-entropy, summed over targets.
    Both distributions are taken at temperature T; T^2 keeps the size of the gradients (Hinton et
    al., arXiv 1503.02531, section 2). The student's auxiliary loss is added if it has one.
    """

    def __init__(
        self, model: nn.Module, teacher: Teacher, fused: bool, *, temperature: float, weight: float
    ) -> None:
        super().__init__(model, fused)
        self.teacher = teacher
        self.temperature, self.weight = temperature, weight

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
        if not self.training:
            return cross_entropy_sum(self.model, self.fused, states, targets)
        taught = self.teacher(input_ids, position_ids, hidden=self.fused).flatten(0, 1)
        if self.fused:
            head = self.teacher.model.get_output_embeddings()
            divergence, entropy, loss = fused_linear_distillation(
                *with_head(self.model, states),
                taught,
                head.weight,
                head.bias,
                targets.flatten(),
                self.temperature,
                self.weight,
            )
        else:
            logits = states.float()  # (N, V)
            divergence = divergence_sum(logits, taught.float(), targets.flatten(), self.temperature)
            entropy = cross_entropy_sum(self.model, False, logits, targets)
            loss = self.weight * divergence + (1 - self.weight) * entropy
        self.parts = {
            "distillation_loss": divergence.detach(),
            "cross_entropy": entropy.detach(),
        }
        if auxiliary is not None:
            auxiliary = over_targets(auxiliary, targets)
            self.parts["auxiliary_loss"] = auxiliary.detach()
            loss = loss + auxiliary
        return loss

    def materialize_with(self, model: Materialize, device: torch.device) -> Materialize:
        teacher = self.teacher.materializer(self, device)

        def materialize(part: nn.Module) -> None:
            model(part)
            teacher(part)

        return materialize


def divergence_sum(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Returns T^2 * KL(teacher || student), summed over rows with a target.

    Args:
        student: Logits of the student, (N, V).
        teacher: Logits of the teacher, (N, V).
        targets: Next tokens, (N) int64 with IGNORE_INDEX.
        temperature: T.

    Returns:
        Divergence, a scalar of the logits' type.
    """
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    return temperature**2 * rows.masked_fill(targets == IGNORE_INDEX, 0.0).sum()


def fused_linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    distillation_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `DistillationLoss` from hidden states, a few rows of logits at a time.

    Gradients are computed in forward, as in `fused_linear_cross_entropy`, for the student only. The
    teacher's logits are computed in its own type, also under autocast.

    Args:
        hidden: Hidden states of the student, (N, H).
        weight: Weight of the student's head, (V, H), in the type of `hidden`.
        bias: Bias of the student's head, (V), or None.
        teacher_hidden: Hidden states of the teacher, (N, H of the teacher).
        teacher_weight: Weight of the teacher's head, (V, H of the teacher), in the type of
            `teacher_hidden`.
        teacher_bias: Bias of the teacher's head, (V), or None.
        targets: Next tokens, (N) int64 with IGNORE_INDEX.
        temperature: T.
        distillation_weight: Weight of the divergence; the rest, to 1, is the weight of
            cross-entropy.

    Returns:
        T^2 * KL and cross-entropy, both without a gradient, and the loss; float32 scalars.
    """
    sums: tuple[Tensor, Tensor, Tensor] = _FusedLinearDistillation.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        (teacher_hidden, teacher_weight, teacher_bias),
        targets,
        temperature,
        distillation_weight,
    )
    return sums


class _FusedLinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: tuple[Tensor, Tensor, Tensor | None],
        targets: Tensor,
        temperature: float,
        distillation_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        teacher_hidden, teacher_weight, teacher_bias = teacher
        divergence = hidden.new_zeros((), dtype=torch.float32)
        entropy = hidden.new_zeros((), dtype=torch.float32)
        for rows in chunks(hidden, weight):
            target = targets[rows]
            counted = target != IGNORE_INDEX
            index = target.clamp_min(0).unsqueeze(1)  # (n, 1)
            logits = F.linear(hidden[rows], weight, bias).float()  # (n, V), as all matrices below
            with torch.autocast(hidden.device.type, enabled=False):
                taught = F.linear(teacher_hidden[rows], teacher_weight, teacher_bias).float()
            # In place where possible: several matrices of this size would not fit beside each
            # other.
            log_p = _log_softmax_(taught.div_(temperature))
            log_q = _log_softmax_(logits / temperature)
            p = log_p.exp()
            losses = log_p.sub_(log_q).mul_(p).sum(1)
            divergence += losses.masked_fill_(~counted, 0.0).sum()
            log_norm = logits.logsumexp(1, keepdim=True)
            losses = (log_norm - logits.gather(1, index)).squeeze(1)
            entropy += losses.masked_fill_(~counted, 0.0).sum()
            if not grads.wanted:
                continue
            # d/dlogits of T^2 * KL is T * (q - p).
            grad = log_q.exp_().sub_(p).mul_(distillation_weight * temperature)
            if distillation_weight < 1:
                hard = logits.sub_(log_norm).exp_()
                hard.scatter_add_(1, index, -torch.ones_like(log_norm))
                grad.add_(hard, alpha=1 - distillation_weight)
            grads.add(rows, grad.mul_(counted.unsqueeze(1)))
        ctx.grads = grads.finish()
        divergence *= temperature**2
        ctx.mark_non_differentiable(divergence, entropy)
        loss = distillation_weight * divergence + (1 - distillation_weight) * entropy
        return divergence, entropy, loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *_, scale = grad_outputs
        grads, ctx.grads = ctx.grads, ()  # scaled in place, so they can be used only once
        return *(None if g is None else g.mul_(scale) for g in grads), None, None, None, None


def _log_softmax_(logits: Tensor) -> Tensor:
    return logits.sub_(logits.logsumexp(1, keepdim=True))
