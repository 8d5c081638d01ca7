"""The contract between the gateway and an engine, which generates tokens.

An engine takes and returns token ids; the text stages around it handle text. Every engine is a
separate process (or a server elsewhere), since its libraries may conflict with the gateway's.

An engine program reads and writes one JSON object a line on its standard input and output:

    gateway -> engine
        {"submit": {...}}                     the fields of `TokenRequest`
        {"cancel": "ID"}
        {"embed": {"id": "ID", "inputs": [[1, 2], ...], "adapter": "NAME" or null}}
        {"score": {"id": "ID", "tokens": [1, 2, ...], "start": 5, "of": [[7, 8], ...],
                   "adapter": "NAME" or null, "turned": [[3, 0], ...]}}  asks for scores of its own
                                 weights by a plain forward; `turned`: ties to decide the other way
        {"proven": null}                      no more scores will be asked for
        end of file                           the gateway has ended: exit
    engine -> gateway
        {"ready": {...}}                      once, the fields of `EngineInfo`
        {"step": {"tokens": [["ID", [5, 9], LOGPROBS or null], ...],
                  "finished": [["ID", "stop" or "length"], ...],
                  "running": 3, "kv_cache_usage": 0.2}}
        {"failed": {"id": "ID", "error": "one line"}}
        {"refused": {"id": "ID", "error": "one line"}}   the request's schema is not supported
        {"embedding": {"id": "ID", "vector": [0.1, ...]}}   one line for each input, in their order
        {"scored": {"id": "ID", "scores": [[-0.1, -0.2, -3.0], ...], "ties": [[3, 0], ...]}}
                                 log-probabilities at each position from `start` on: the likeliest
                                 token's, and those of `of`; and choices that rounding decides
        {"idle": {"kv_cache_usage": 0.0}}     twice a second while there is nothing to do
        {"misconfigured": ["key", "value", "rule", "fix"]}    before it exits: a setting is wrong
        {"unfit": "one line"}                 before it exits: this engine cannot run such a model
        {"fatal": "one line"}                 before it exits because of an error

LOGPROBS is a list with an entry for each token: [its log-probability, [[token, log-probability],
...]]. They are of the model's own distribution, before temperature and the other sampling settings
of the request. A line of any kind is a heartbeat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from core.errors import SpotforgeError
from serving.sampling import SamplingParams

# A choice that rounding decides, such as the last expert that a router selects for a token: the
# index of the choice in the forward pass, and the row of its scores.
Tie = tuple[int, int]


class EngineError(SpotforgeError):
    """An engine could not complete a request; the request is lost, the gateway goes on."""


class EngineFailed(EngineError):
    """An engine failed at a request and would fail again, so it is not repeated."""


class EngineRefused(EngineError):
    """An engine did not accept a request, for instance because it does not support its schema.

    Args:
        message: Reason in one line.
        retry_after_s: Seconds until a busy engine should be asked again; None: the engine would
            refuse the same request again.
    """

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unproven(SpotforgeError):
    """An engine cannot run a model, or its scores differ from a plain forward of the same model.

    Another engine may run the model correctly.
    """


@dataclass(frozen=True, slots=True)
class TokenRequest(SamplingParams):
    """A request for one sequence, with its sampling settings.

    Attributes:
        id: Id that is unique among the engine's requests.
        prompt: Token ids, at least one.
        max_tokens: New tokens, at most; at least 1.
        seed: Seed of the draws. The same seed, prompt and model give the same tokens, whatever else
            is in the batch.
        logprobs: Number of alternatives to return with each token's own log-probability; None: no
            log-probabilities.
        ignore_eos: True: generate up to `max_tokens` even after an EOS.
        offset: Number of the prompt's last tokens that were generated before the engine was lost;
            the seed's random stream goes on from there.
        schema: JSON schema that the text must satisfy; None: any text.
        adapter: Name of the LoRA adapter that is added to the model; None: the model alone.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    seed: int = 0
    logprobs: int | None = None
    ignore_eos: bool = False
    offset: int = 0
    schema: dict[str, Any] | None = None
    adapter: str | None = None

    def rest(self, tokens: list[int]) -> TokenRequest:
        """Returns the request for what is still to be generated after its first tokens."""
        return dataclasses.replace(
            self,
            prompt=self.prompt + tokens,
            max_tokens=self.max_tokens - len(tokens),
            offset=len(tokens),
        )


class TokenLogprob(NamedTuple):
    """Natural logarithms of probabilities under the model's own distribution.

    Attributes:
        logprob: Log-probability of the generated token.
        top: Likeliest tokens with their log-probabilities, most likely first.
    """

    logprob: float
    top: list[tuple[int, float]]


class TokenChunk(NamedTuple):
    """Tokens that an engine generated for one request since the last chunk.

    Attributes:
        tokens: Token ids, without the EOS that ended the text.
        logprobs: Log-probabilities, one entry a token; None: they were not asked for.
        finish_reason: `stop` (the model ended the text) or `length`; None: more chunks follow.
        text: Generated text, where the engine returns text and not ids; `tokens` is empty then.
        text_tokens: Number of tokens in `text`.
    """

    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    text: str | None = None
    text_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens that were generated."""
        return len(self.tokens) + self.text_tokens


@dataclass(frozen=True)
class EngineInfo:
    """Properties that an engine reports once it is up.

    Attributes:
        engine: Name and version, such as `transformers 5.23.0`.
        max_context: Tokens of prompt and answer together, at most.
        max_running: Sequences that the engine steps at once.
        max_logprobs: Alternatives that the engine can return for each token; -1: the engine returns
            no log-probabilities.
        features: Subset of `embeddings`, `json_schema`, `top_k`, `min_p`, `repetition_penalty` and
            `logprobs_when_sampling`. With the last, log-probabilities are the model's own however
            tokens are sampled; without it, only where sampling leaves the distribution unchanged.
        built_with: Other versions that the numbers depend on, such as `torch 2.13.0+cpu on cpu`.
        restored_buffers: Names of buffers that loading left uninitialized and that were computed.
    """

    engine: str
    max_context: int
    max_running: int
    max_logprobs: int = 20
    features: list[str] = field(default_factory=list)
    built_with: str = ""
    restored_buffers: list[str] = field(default_factory=list)

    def tells_logprobs(self, params: SamplingParams) -> bool:
        """Returns whether the engine returns the model's own log-probabilities with settings."""
        if self.max_logprobs < 0:
            return False
        return params.is_models_own or "logprobs_when_sampling" in self.features


@dataclass
class EngineStats:
    """State of an engine, and its counts since the gateway started.

    Attributes:
        running: Sequences in the engine now.
        kv_cache_usage: Share of the KV cache that is in use, 0 to 1.
        prompt_tokens: Prompt tokens that were submitted.
        generation_tokens: Tokens that were generated.
        restarts: Times that the engine was started again because it died or hung.
    """

    running: int = 0
    kv_cache_usage: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    restarts: int = 0


class Engine(Protocol):
    """Interface of an engine, as the gateway uses it."""

    @property
    def info(self) -> EngineInfo:
        """Properties of the engine that is up, or was up last."""
        ...

    @property
    def is_ready(self) -> bool:
        """True if the engine answered the last probe with a token and is alive since."""
        ...

    async def start(self, prove: Prove | None = None) -> EngineInfo:
        """Starts the engine, has it generate one token, and checks its scores.

        Args:
            prove: Check of the scores, called once the engine takes requests; None: no check.

        Raises:
            SpotforgeError: The engine did not come up; no process of it is left. The error is a
                ConfigError if a setting is the cause, and Unproven if another engine may work.
        """
        ...

    def submit(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        """Generates a sequence; the last chunk has a `finish_reason`.

        Closing the iterator early cancels the request.

        Raises:
            EngineRefused: The engine does not accept the request.
            EngineFailed: The request fails and would fail again.
            EngineError: The request is lost.
        """
        ...

    async def embed(
        self, id: str, inputs: list[list[int]], adapter: str | None = None
    ) -> list[list[float]]:
        """Returns a vector of unit length for each list of token ids.

        Raises:
            EngineError: The engine could not compute them.
        """
        ...

    def stats(self) -> EngineStats:
        """Returns the state and counts of the engine as they are now."""
        ...

    async def close(self) -> None:
        """Stops the engine; requests that it still has are lost, so drain first."""
        ...


# Compares an engine's scores with a plain forward; raises Unproven if they differ.
Prove = Callable[[Engine], Awaitable[None]]
