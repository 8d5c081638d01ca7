"""The contract between the gateway and what generates tokens.

An engine takes token ids and gives token ids; text is the business of the stages around it. Every
engine is a process of its own (or a server elsewhere), since their libraries clash with ours.

What an engine program is told and says is one JSON object a line, on its standard input and output:

    gateway -> engine
        {"submit": {...}}                     the fields of `TokenRequest`
        {"cancel": "ID"}
        {"embed": {"id": "ID", "inputs": [[1, 2], ...], "adapter": "NAME" or null}}
        {"score": {"id": "ID", "tokens": [1, 2, ...], "start": 5, "of": [[7, 8], ...],
                   "adapter": "NAME" or null, "turned": [[3, 0], ...]}}  of its own weights, by a
                                 plain forward; `turned` is of the ties that it told
        {"proven": null}                      no more scores will be asked for
        end of file                           the gateway is gone: exit
    engine -> gateway
        {"ready": {...}}                      once, the fields of `EngineInfo`
        {"step": {"tokens": [["ID", [5, 9], LOGPROBS or null], ...],
                  "finished": [["ID", "stop" or "length"], ...],
                  "running": 3, "kv_cache_usage": 0.2}}
        {"failed": {"id": "ID", "error": "one line"}}
        {"refused": {"id": "ID", "error": "one line"}}   its schema, which the client can change
        {"embedding": {"id": "ID", "vector": [0.1, ...]}}   of one input, in their order
        {"scored": {"id": "ID", "scores": [[-0.1, -0.2, -3.0], ...], "ties": [[3, 0], ...]}}
                                 log-probabilities in each place from `start` on: the likeliest
                                 token's, and those of `of`; choices that rounding decides
        {"idle": {"kv_cache_usage": 0.0}}     twice a second while there is nothing to do
        {"misconfigured": ["key", "value", "rule", "fix"]}    before it exits: a setting is wrong
        {"unfit": "one line"}                 before it exits: this engine cannot run such a model
        {"fatal": "one line"}                 before it exits by itself

LOGPROBS is a list, for each token [its log-probability, [[token, log-probability], ...]]: of the
model's own distribution, before what a request asks for. A line of any kind is a heartbeat.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from core.errors import SpotforgeError

# A choice that rounding decides, such as the last expert that a mixture's router takes for a token:
# which of a forward's choices, and which row of scores.
Tie = tuple[int, int]


class EngineError(SpotforgeError):
    """An engine could not do what it was asked to; the request is lost, the gateway is not."""


class EngineFailed(EngineError):
    """An engine failed at a request, and would again: asking once more is in vain."""


class EngineRefused(EngineError):
    """An engine did not take a request, as with a schema that it cannot hold a text to.

    Args:
        message: What it said.
        retry_after_s: It is busy: come back then. None: asking again is in vain.
    """

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unproven(SpotforgeError):
    """An engine does not compute what a plain forward of the same model does, or does not run it.

    Another engine may.
    """


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What an engine is asked for: one sequence.

    Attributes:
        id: Unique among all that the engine has.
        prompt: Token ids, at least one.
        max_tokens: New tokens at most, at least 1.
        temperature: 0: the likeliest token.
        top_p: In (0, 1].
        top_k: Only so many of the likeliest tokens; 0: all.
        min_p: The least share of the likeliest token's probability, in [0, 1].
        repetition_penalty: Of tokens that are there already, as transformers has it; 1: none.
        seed: The same seed, prompt and model give the same tokens, whatever else is in the batch.
        logprobs: How many alternatives to tell beside each token's own; None: nothing at all.
        ignore_eos: Go on to `max_tokens`.
        offset: How many of the prompt's last tokens were generated already, by an engine that was
            lost: the seed's stream goes on from there.
        schema: JSON schema that the text is to satisfy; None: any text.
        adapter: LoRA adapter that is added to the model; None: the model alone.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    ignore_eos: bool = False
    offset: int = 0
    schema: dict[str, Any] | None = None
    adapter: str | None = None


class TokenLogprob(NamedTuple):
    """Natural logarithms of probabilities under the model's own distribution.

    Attributes:
        logprob: Of the token that was taken.
        top: The likeliest tokens and theirs, most likely first.
    """

    logprob: float
    top: list[tuple[int, float]]


class TokenChunk(NamedTuple):
    """What an engine made of one request since the last chunk.

    Attributes:
        tokens: Token ids; the one that ended the text is not among them.
        logprobs: One for each token; None where none were asked for.
        finish_reason: `stop` (the model ended it) or `length`; None: there is more to come.
        text: What was generated, where the engine gives text in place of ids; `tokens` is empty.
        text_tokens: How many tokens that text is.
    """

    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    text: str | None = None
    text_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """That were generated."""
        return len(self.tokens) + self.text_tokens


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself once it is up.

    Attributes:
        engine: Name and version, as `transformers 5.23.0`.
        max_context: Tokens of prompt and answer together, at most.
        max_running: Sequences that it steps at once.
        max_logprobs: Alternatives that it can tell; -1: it tells no log-probabilities.
        features: Of `embeddings`, `json_schema`, `top_k`, `min_p`, `repetition_penalty`, and
            `logprobs_when_sampling`: they are the model's own however tokens are chosen, not only
            where sampling changes nothing.
        built_with: What its numbers depend on, too, as `torch 2.13.0+cpu on cpu`.
        restored_buffers: Names of buffers that loading had left without their values.
    """

    engine: str
    max_context: int
    max_running: int
    max_logprobs: int = 20
    features: list[str] = field(default_factory=list)
    built_with: str = ""
    restored_buffers: list[str] = field(default_factory=list)


@dataclass
class EngineStats:
    """What an engine did and does; the counts are since the gateway started.

    Attributes:
        running: Sequences in the engine now.
        kv_cache_usage: Share of the cache that is in use, 0 to 1.
        prompt_tokens: That were handed to it.
        generation_tokens: That came back.
        restarts: Times that it was started again, since it died or hung.
    """

    running: int = 0
    kv_cache_usage: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    restarts: int = 0


class Engine(Protocol):
    """What the gateway knows of engines."""

    @property
    def info(self) -> EngineInfo:
        """Of the engine that is up, or was last."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether it made a token when it was last asked, and is alive since."""
        ...

    async def start(self, prove: Prove | None = None) -> EngineInfo:
        """Starts it, has it make one token, and has that proven.

        Args:
            prove: Called once the engine takes requests; None: nothing is asked of its numbers.

        Raises:
            SpotforgeError: It did not come up; nothing of it is left running. A ConfigError where
                a setting is why; Unproven where another engine may do better.
        """
        ...

    def submit(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        """Generates; the last chunk has a `finish_reason`. Leaving the loop early cancels.

        Raises:
            EngineRefused: Its schema cannot be held to.
            EngineFailed: It cannot be done.
            EngineError: The request is lost.
        """
        ...

    async def embed(
        self, id: str, inputs: list[list[int]], adapter: str | None = None
    ) -> list[list[float]]:
        """A vector of unit length for each list of token ids.

        Raises:
            EngineError: The engine cannot.
        """
        ...

    def stats(self) -> EngineStats:
        """Now."""
        ...

    async def close(self) -> None:
        """Stops it; what it still has is lost. Drain first."""
        ...


# Asks an engine for what it computes; raises Unproven where that is wrong.
Prove = Callable[[Engine], Awaitable[None]]
