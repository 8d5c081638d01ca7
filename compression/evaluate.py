"""Compares a compressed model with its parent: perplexity, KL divergence, greedy agreement.

Both models run one block at a time, so that models that do not fit into memory can be compared.

Shapes: N samples of T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from compression.hidden import Hidden, embed
from compression.progress import Advance
from compression.stream import BlockStream

_Z = 1.96  # quantile of a two-sided 95% interval


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval (normal approximation, with samples as the independent units)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """Returns the interval of the mean of one value for each sample (N,)."""
        mean = float(values.mean())
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return cls(mean, mean - _Z * error, mean + _Z * error)

    def exp(self) -> Interval:
        """Returns the exponential of the mean and of both ends."""
        if not math.isfinite(self.high):
            return Interval(math.exp(self.mean), self.low, self.high)
        # exp(710) overflows a double.
        return Interval(*(math.exp(min(x, 700.0)) for x in (self.mean, self.low, self.high)))

    def describe(self) -> dict[str, float | None]:
        """Returns JSON types; null for the ends if a single sample leaves no interval."""
        values = {"mean": self.mean, "low": self.low, "high": self.high}
        return {key: value if math.isfinite(value) else None for key, value in values.items()}


@dataclass(frozen=True)
class Quality:
    """Quality of a child compared with its parent on the same tokens.

    Attributes:
        parent_perplexity: Perplexity of the parent.
        child_perplexity: Perplexity of the child.
        perplexity_ratio: Ratio of the child's perplexity to the parent's, with the interval of the
            paired difference of their losses.
        kl_nats: KL(parent || child), in nats a token.
        greedy_agreement: Share of tokens for which both predict the same most likely next token.
        num_tokens: Number of predicted tokens.
    """

    parent_perplexity: float
    child_perplexity: float
    perplexity_ratio: Interval
    kl_nats: Interval
    greedy_agreement: Interval
    num_tokens: int

    def describe(self) -> dict[str, object]:
        """Returns the figures as JSON types."""
        return {
            "parent_perplexity": self.parent_perplexity,
            "child_perplexity": self.child_perplexity,
            "perplexity_ratio": self.perplexity_ratio.describe(),
            "kl_nats": self.kl_nats.describe(),
            "greedy_agreement": self.greedy_agreement.describe(),
            "num_tokens": self.num_tokens,
        }


def final_hidden(stream: BlockStream, input_ids: Tensor, folder: Path, advance: Advance) -> Hidden:
    """Returns the output of a model's last block for token ids; the head is loaded afterwards.

    Args:
        stream: Stream of the model, with no block read yet.
        input_ids: Token ids (N, T) int64.
        folder: Folder for the hidden states between blocks; the last file stays.
        advance: Called with the number of blocks that are done, and their total.
    """
    advance(0, len(stream.blocks))
    stream.load_embedding()
    width = stream.model.config.get_text_config().hidden_size
    hidden = embed(input_ids, stream.embed, folder / "hidden-0.bin", width)
    for index in range(len(stream.blocks)):
        stream.load(index)
        following = hidden.map(partial(stream.run, index), folder / f"hidden-{index + 1}.bin")
        stream.release(index)
        hidden.path.unlink()
        hidden = following
        advance(index + 1, len(stream.blocks))
    stream.load_head()
    return hidden


@torch.no_grad()
def perplexity(stream: BlockStream, input_ids: Tensor, folder: Path, advance: Advance) -> float:
    """Returns the perplexity of one model; see `final_hidden` for the arguments."""
    hidden = final_hidden(stream, input_ids, folder, advance)
    losses = [
        F.cross_entropy(logits[0, :-1], ids[1:])
        for logits, ids in zip(logits_of(stream, hidden), input_ids, strict=True)
    ]
    return math.exp(min(float(torch.stack(losses).mean()), 700.0))


@torch.no_grad()
def compare(before: Iterable[Tensor], after: Iterable[Tensor], input_ids: Tensor) -> Quality:
    """Compares the next-token distributions of two models.

    Args:
        before: Logits of the parent (1, T, V) for each sample; see `logits_of`.
        after: Logits of the child (1, T, V) for each sample.
        input_ids: Token ids (N, T) int64.
    """
    parent_loss, child_loss, kl, agree = [], [], [], []
    for parent, child, ids in zip(before, after, input_ids, strict=True):
        targets = ids[1:]
        log_p = parent[0, :-1].log_softmax(-1)  # (T - 1, V)
        log_q = child[0, :-1].log_softmax(-1)
        parent_loss.append(F.nll_loss(log_p, targets))
        child_loss.append(F.nll_loss(log_q, targets))
        agree.append((log_p.argmax(-1) == log_q.argmax(-1)).float().mean())
        # `batchmean` divides by the number of tokens: nats a token.
        kl.append(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
    parent_losses, child_losses = torch.stack(parent_loss), torch.stack(child_loss)
    return Quality(
        math.exp(float(parent_losses.mean())),
        math.exp(min(float(child_losses.mean()), 700.0)),
        Interval.of(child_losses - parent_losses).exp(),
        Interval.of(torch.stack(kl)),
        Interval.of(torch.stack(agree)),
        input_ids[:, 1:].numel(),
    )


def logits_of(stream: BlockStream, hidden: Hidden) -> Iterator[Tensor]:
    """Yields the logits of one sample after another: (1, T, V) float32.

    One sample at a time, since the logits of all would not fit into memory.

    Args:
        stream: Stream of the model, with its head loaded.
        hidden: Output of the last block, see `final_hidden`.
    """
    for row in _rows(hidden):
        yield stream.logits(row)


def _rows(hidden: Hidden) -> Iterator[Tensor]:
    for batch in hidden.batches():
        yield from batch.split(1)
