"""Sampling by each request's own settings, in batches of any mix.

transformers samples all requests of a batch with the same settings, from one stream of random
numbers. Here every request has its own settings and seed, and the token at a position does not
depend on the rest of the batch: a request that is started again goes on with the same tokens. A
request with a schema gets only tokens that its grammar allows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from serving.engine import TokenRequest


class Row(Protocol):
    """A sequence whose next token is chosen, with the names that transformers gives them.

    Attributes:
        request_id: Id of the request.
        initial_tokens: Token ids of the prompt.
        generated_tokens: Tokens that were generated so far.
    """

    request_id: str
    initial_tokens: list[int]
    generated_tokens: list[int]


class Sampler:
    """Chooses the next token of each row.

    Args:
        eos: Tokens that end a text.
    """

    def __init__(self, eos: list[int]) -> None:
        self._eos = eos
        self._requests: dict[str, TokenRequest] = {}
        self._texts: dict[str, _HeldText] = {}
        self._seen: dict[str, _SeenTokens] = {}
        self._logprobs: dict[str, list[Any]] = {}

    def add(self, request: TokenRequest, matcher: LLMatcher | None) -> None:
        """Adds a request; must come before the request is submitted for generation.

        Args:
            request: Request with its own sampling settings.
            matcher: Matcher of its schema at the beginning of the text; None: no schema.
        """
        self._requests[request.id] = request
        if matcher is not None:
            self._texts[request.id] = _HeldText(matcher, request)
        if request.repetition_penalty != 1:
            self._seen[request.id] = _SeenTokens(request.repetition_penalty)
        if request.logprobs is not None:
            self._logprobs[request.id] = []

    def remove(self, name: str) -> None:
        """Removes a request that has ended."""
        self._requests.pop(name, None)
        self._texts.pop(name, None)
        self._seen.pop(name, None)
        self._logprobs.pop(name, None)

    def error(self, name: str) -> str | None:
        """Returns why a request's grammar failed, e.g. beyond its limits; None: it did not."""
        text = self._texts.get(name)
        return text.matcher.get_error() if text is not None and text.matcher.is_error() else None

    def take_logprobs(self, name: str, count: int) -> list[Any] | None:
        """Takes the log-probabilities of a request's next tokens; None: none were asked for."""
        kept = self._logprobs.get(name)
        if kept is None:
            return None
        # In place, since the generation thread appends to the same list.
        taken, kept[:count] = kept[:count], []
        return taken

    def __call__(self, scores: Tensor, rows: Sequence[Row]) -> Tensor:
        """Returns the next token of each row, (N,) int64.

        Args:
            scores: Float32 logits, (N, V); there may be more than there are rows.
            rows: Sequences that the logits are for.
        """
        drawn: list[tuple[int, TokenRequest, float]] = []
        requests: list[TokenRequest | None] = []
        for i, state in enumerate(rows):
            request = self._requests.get(state.request_id)  # None: cancelled in the meantime
            requests.append(request)
            if request is not None and request.temperature > 0:
                position = len(state.initial_tokens) + len(state.generated_tokens)
                # The number depends on seed and position only: it is the same after a restart and
                # in any batch.
                drawn.append((i, request, random.Random(f"{request.seed} {position}").random()))
        allowed = self._allowed(self._penalized(scores, rows), rows)
        chosen = allowed.argmax(dim=-1)
        if drawn:
            those = torch.tensor([i for i, _, _ in drawn], device=scores.device)
            columns = zip(
                *((r.temperature, r.top_k, r.top_p, r.min_p, u) for _, r, u in drawn), strict=True
            )
            chosen[those] = draw(
                allowed[those],
                *(torch.tensor(c, device=scores.device, dtype=torch.float64) for c in columns),
            )
        self._note_logprobs(scores, chosen, requests)
        return chosen

    def _penalized(self, scores: Tensor, rows: Sequence[Row]) -> Tensor:
        """Returns the scores (N, V) with each row's repetition penalty applied."""
        penalized = scores
        for i, state in enumerate(rows):
            if (seen := self._seen.get(state.request_id)) is not None:
                penalized = scores.clone() if penalized is scores else penalized
                penalized[i] = seen.penalize(scores[i], state)
        return penalized

    def _allowed(self, scores: Tensor, rows: Sequence[Row]) -> Tensor:
        """Returns the scores (N, V) with -inf for tokens that a row's grammar forbids."""
        held = [
            (i, text)
            for i, state in enumerate(rows)
            if (text := self._texts.get(state.request_id)) is not None
        ]
        if not held:
            return scores
        allowed = scores.clone()
        for i, text in held:
            mask = text.mask(rows[i], scores.shape[-1])
            if text.matcher.is_error():  # ends the request; `error` says why
                mask = torch.zeros(scores.shape[-1], dtype=torch.bool)
                mask[self._eos] = True
            allowed[i].masked_fill_(~mask.to(scores.device), -torch.inf)
        return allowed

    def _note_logprobs(
        self, scores: Tensor, chosen: Tensor, requests: list[TokenRequest | None]
    ) -> None:
        for i, request in enumerate(requests):
            if request is None or request.logprobs is None:
                continue
            # Of the scores before penalty, grammar and temperature: the model's own distribution.
            logprobs = scores[i].log_softmax(-1)
            values, indices = logprobs.topk(min(request.logprobs, logprobs.numel()))
            kept = self._logprobs.get(request.id)
            if kept is not None:
                top = list(zip(indices.tolist(), values.tolist(), strict=True))
                kept.append((logprobs[chosen[i]].item(), top))


class _HeldText:
    """The state of a text that follows a grammar.

    The text may begin in the prompt: its last tokens are the answer's first ones if the engine that
    generated them was lost.
    """

    def __init__(self, matcher: LLMatcher, request: TokenRequest) -> None:
        self.matcher = matcher
        self._seen = len(request.prompt) - request.offset  # tokens of prompt and answer

    def mask(self, state: Row, vocab_size: int) -> Tensor:
        """Returns which tokens may come next, (V,) bool."""
        initial = state.initial_tokens
        new = initial[self._seen :] + state.generated_tokens[max(0, self._seen - len(initial)) :]
        self._seen += len(new)
        self.matcher.consume_tokens(new)
        packed = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(packed, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits).bool()


class _SeenTokens:
    """The tokens that occur in a prompt and its answer so far."""

    def __init__(self, penalty: float) -> None:
        self._penalty = penalty
        self._mask: Tensor | None = None  # (V,) bool
        self._count = 0

    def penalize(self, scores: Tensor, state: Row) -> Tensor:
        """Returns the penalized scores (V,), as by `RepetitionPenaltyLogitsProcessor`."""
        if self._mask is None:
            self._mask = torch.zeros_like(scores, dtype=torch.bool)
        initial, generated = state.initial_tokens, state.generated_tokens
        new = initial[self._count :] + generated[max(0, self._count - len(initial)) :]
        self._count += len(new)
        self._mask[torch.tensor(new, device=scores.device, dtype=torch.long)] = True
        lower = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        return torch.where(self._mask, lower, scores)


def draw(
    scores: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """Draws a token for each row, by the inverse of its cumulative distribution.

    Tokens are removed by the rules of transformers' warpers, in the same order.

    Args:
        scores: Logits, (N, V).
        temperature: Divisor of the logits above 0, (N,).
        top_k: Number of the likeliest tokens that stay, with those that equal the last; 0: all.
            (N,)
        top_p: Probability mass of the likeliest tokens that stay, in (0, 1]; (N,).
        min_p: Least probability relative to the likeliest token's, in [0, 1]; (N,).
        uniform: Random numbers in [0, 1), (N,).

    Returns:
        Token ids, (N,) int64.
    """
    # The largest score is subtracted before the division: a tiny temperature would give inf - inf.
    shifted = (scores.double() - scores.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(1)
    if bool((top_k > 0).any()):
        ordered = shifted.sort(dim=-1, descending=True).values
        last = torch.where(top_k > 0, top_k, scores.shape[-1]).clamp_max(scores.shape[-1]) - 1
        shifted = shifted.masked_fill(shifted < ordered.gather(1, last.long()[:, None]), -torch.inf)
    probabilities = shifted.softmax(-1)
    if bool((top_p < 1).any()):
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # mass of likelier tokens; 0 for the likeliest
        ordered = ordered.masked_fill(before >= top_p.unsqueeze(1), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
    if bool((min_p > 0).any()):
        least = min_p.unsqueeze(1) * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    # Not normalized: the number is scaled to what is left of the mass instead. `right` skips tokens
    # of probability 0, also for the number 0.
    cumulative = probabilities.cumsum(-1)
    wanted = uniform.unsqueeze(1) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, wanted, right=True).squeeze(1)
    # Rounding may lift the product to the whole sum, which would give the index V.
    return found.clamp_max(scores.shape[-1] - 1)
