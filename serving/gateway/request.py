"""Requests of clients for a model, without HTTP: `incoming.py` reads them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.admission import Priority
from serving.keys import Key
from serving.models import AdaptedModel, Model
from serving.text.codec import Chat


@dataclass(frozen=True, kw_only=True)
class InferenceRequest:
    """A client's request for a model; the fields from `max_tokens` on are those of a generation.

    Attributes:
        key: Key of the client.
        model: Model or adapter.
        deadline_s: Seconds that the request may take from its arrival on.
        priority: Priority in the queue.
        prompts: Texts, token ids, or one conversation.
        prompts_field: Field of the body with the prompts.
        max_tokens: New tokens of each sequence, at most; None: not given.
        max_tokens_field: Field of the body with that limit.
        default_max_tokens: Limit if none is given, reduced to what fits; None: what fits.
        sampling: Fields of `SamplingParams` that are given, by name.
        n: Sequences for each prompt.
        seed: Seed of the first sequence; None: a random one.
        logprobs: Alternatives for each token; None: no log-probabilities.
        stop: Texts that end a sequence.
        ignore_eos: True: generate up to the limit even after an EOS.
        schema: JSON schema that the text must satisfy; None: any text.
        schema_field: Field of the body with the schema.
        id: Unique id, which is in the response and in each line of the logs.
        arrived_s: Time of its arrival by the monotonic clock.
    """

    key: Key
    model: Model | AdaptedModel
    deadline_s: float
    priority: Priority
    prompts: Sequence[str | list[int] | Chat]
    prompts_field: str
    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    default_max_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    schema: dict[str, object] | None = None
    schema_field: str = "response_format"
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; below 0: it has passed."""
        return self.arrived_s + self.deadline_s - time.monotonic()
