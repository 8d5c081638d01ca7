"""The gateway: authorizes a request, encodes its prompts, checks it, and admits it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

from starlette.requests import Request

from serving.admission import (
    Admission,
    DeadlineExpired,
    Limits,
    Priority,
    Rejected,
    Slot,
)
from serving.config import ServingConfig
from serving.deployment import Deployment
from serving.engine import EngineError
from serving.errors import (
    DeadlinePassed,
    InvalidRequest,
    LimitReached,
    NotFound,
    RequestError,
    Unauthorized,
    Unavailable,
)
from serving.gateway.request import Generation, Sampling, lost, tells_logprobs
from serving.keys import Key, Keys
from serving.metrics import Metrics
from serving.models import AdaptedModel, Model
from serving.sampling import Choice
from serving.telemetry import Telemetry
from serving.text.codec import Chat, TextError

# Key of an ASGI scope with the id of an API key: batches in this process act for its owner. No HTTP
# request can set it.
OWNER = "spotforge.owner"
ANYBODY = Key("anonymous", sha256="", created="")
_TIMEOUT_HEADER = "x-request-timeout"
_PRIORITY_HEADER = "x-priority"
_DAY_S = 86_400.0


class Gateway:
    """State of the server.

    Attributes:
        config: Settings of the server.
        keys: API keys; None: requests need no key.
        telemetry: Logs of requests.
        models: Models by the name that clients use.
        adapted: Models with an adapter, by the adapter's name.
        admission: Admission control.
        metrics: Metrics of `/metrics`.
        is_draining: True: the server was told to stop.
    """

    def __init__(self, config: ServingConfig, keys: Keys | None, telemetry: Telemetry) -> None:
        self.config, self.keys, self.telemetry = config, keys, telemetry
        self.models: dict[str, Model] = {}
        self.adapted: dict[str, AdaptedModel] = {}
        self.metrics = Metrics()
        self.admission = Admission(
            Limits(
                max_running=config.engine.max_running,
                max_queued_requests=config.admission.max_queued_requests,
                max_queued_tokens=config.admission.max_queued_tokens,
                request_timeout_s=config.admission.request_timeout_s,
            )
        )
        self.is_draining = False

    @property
    def is_ready(self) -> bool:
        """True if requests would be answered now."""
        return (
            not self.is_draining
            and bool(self.models)
            and all(model.champion.is_ready for model in self.models.values())
        )

    def authorize(self, request: Request) -> Key:
        """Returns the key of a request.

        Raises:
            Unauthorized: the request has no valid key.
        """
        if self.keys is None:
            return ANYBODY
        owner = request.scope.get(OWNER)
        header = request.headers.get("authorization")
        key = self.keys.find(header) if owner is None else self.keys.named(owner)
        if key is None:
            text = "the API key is missing or not valid: send Authorization: Bearer sf-..."
            raise Unauthorized(text, code="invalid_api_key")
        return key

    def model(self, name: str) -> Model | AdaptedModel:
        """Returns a model or adapter by its name.

        Raises:
            NotFound: there is none with that name.
        """
        models = self.models | self.adapted
        model = models.get(name)
        if model is None:
            there = ", ".join(sorted(models))
            text = f"there is no model {name[:64]!r}; there is {there}"
            raise NotFound(text, "model", "model_not_found")
        return model

    def deadline_s(self, request: Request) -> float:
        """Returns the seconds that a request may take; a client can ask for less than the setting.

        Raises:
            InvalidRequest: the client's header is not valid.
        """
        most = self.config.admission.request_timeout_s
        asked = request.headers.get(_TIMEOUT_HEADER)
        if asked is None:
            return most
        try:
            seconds = float(asked)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < _DAY_S:
            text = f"{_TIMEOUT_HEADER} must be a number of seconds, above 0 and below {_DAY_S:g}"
            raise InvalidRequest(text, _TIMEOUT_HEADER)
        return min(most, seconds)

    async def begin(
        self,
        request: Request,
        key: Key,
        model: Model | AdaptedModel,
        prompts: Sequence[str | list[int] | Chat],
        sampling: Sampling,
    ) -> Generation:
        """Encodes the prompts, checks the request, and waits for its slots.

        Raises:
            RequestError: The request is refused, or was not admitted.
        """
        # The deployment is picked once: if a rollout replaces it meanwhile, it still finishes this
        # request, since its tokens, limits and defaults were used.
        arrived_s = time.monotonic()
        deadline_s = self.deadline_s(request)
        deployment = model.pick()
        with deployment:
            tokens = await self._encode(deployment, prompts, deadline_s)
            field = "messages" if isinstance(prompts[0], Chat) else "prompt"
            max_tokens = _max_tokens(deployment, tokens, sampling, field)
            choice = deployment.defaults.but(sampling.choice)
            _check_features(deployment, sampling, choice)
            sequences = len(tokens) * sampling.n
            prompt_tokens = sum(map(len, tokens)) * sampling.n
            slot = await self._admit(request, key, model, prompt_tokens, max_tokens, sequences)
        return Generation(
            self.metrics,
            self.telemetry,
            key,
            model,
            deployment,
            tokens,
            max_tokens,
            sampling,
            choice,
            slot,
            arrived_s,
            deadline_s,
            self.telemetry.transcript(prompts, sequences),
        )

    async def embed(
        self,
        request: Request,
        key: Key,
        model: Model | AdaptedModel,
        inputs: Sequence[str | list[int]],
    ) -> tuple[list[list[float]], int, str]:
        """Returns a vector for each input, the number of tokens, and the artifact's version.

        Raises:
            RequestError: The request is refused, was not admitted, or failed.
        """
        deadline_s = self.deadline_s(request)
        over_s = asyncio.get_running_loop().time() + deadline_s
        with model.pick() as deployment:
            info = deployment.engine.info
            if "embeddings" not in info.features:
                raise InvalidRequest(f"{info.engine} has no embeddings", "model", "unsupported")
            tokens = await self._encode(deployment, inputs, deadline_s, "input")
            if (longest := max(map(len, tokens))) > info.max_context:
                text = f"an input has {longest} tokens, but the context has {info.max_context}"
                raise InvalidRequest(text, "input", "context_length_exceeded")
            num_tokens = sum(map(len, tokens))
            slot = await self._admit(request, key, model, num_tokens, 0, 1)
            try:
                id = uuid.uuid4().hex
                async with asyncio.timeout_at(over_s):
                    vectors = await deployment.engine.embed(id, tokens, model.adapter)
            except TimeoutError as e:
                text = f"not finished within the deadline of {deadline_s:g} s"
                raise DeadlinePassed(text, code="deadline") from e
            except EngineError as e:
                raise lost(e) from e
            finally:
                slot.release(num_tokens)
            return vectors, num_tokens, model.identity(deployment)[0]

    def refresh_metrics(self) -> None:
        """Sets the gauges, which show states and not counts."""
        metrics = self.metrics
        metrics.waiting.set(self.admission.waiting)
        for model in self.models.values():
            for deployment in filter(None, (model.champion, model.canary)):
                labels, engine = (model.name, deployment.artifact.version), deployment.engine
                stats = engine.stats()
                metrics.running.labels(*labels).set(stats.running)
                metrics.kv_cache_usage.labels(*labels).set(stats.kv_cache_usage)
                metrics.restarts.labels(*labels).set(stats.restarts)
                metrics.ready.labels(*labels).set(engine.is_ready)
                metrics.text_restarts.labels(*labels).set(deployment.text.restarts)

    async def _admit(
        self,
        request: Request,
        key: Key,
        model: Model | AdaptedModel,
        prompt_tokens: int,
        max_tokens: int,
        sequences: int,
    ) -> Slot:
        name = request.headers.get(_PRIORITY_HEADER, Priority.interactive.name)
        if name not in Priority.__members__:
            text = f"{_PRIORITY_HEADER} must be one of {', '.join(Priority.__members__)}"
            raise InvalidRequest(text, _PRIORITY_HEADER)
        try:
            return await self.admission.acquire(
                key.id,
                prompt_tokens,
                max_tokens,
                self.deadline_s(request),
                sequences,
                Priority[name],
                key.limits,
            )
        except Rejected as e:
            self.metrics.rejections.labels(model.name, key.id, e.reason).inc()
            raise _refusal(e) from e
        except DeadlineExpired as e:
            self.metrics.rejections.labels(model.name, key.id, "expired").inc()
            raise DeadlinePassed(str(e), code="deadline", retry_after_s=1) from e

    async def _encode(
        self,
        deployment: Deployment,
        prompts: Sequence[str | list[int] | Chat],
        deadline_s: float,
        field: str = "prompt",
    ) -> list[list[int]]:
        """Returns the token ids of prompts; `field` is their name in the request."""
        vocab_size = deployment.text.vocab_size
        for prompt in prompts:
            # An engine would index beyond its embedding and crash, losing everybody's requests.
            if isinstance(prompt, list) and (largest := max(prompt)) >= vocab_size:
                text = f"token {largest} is not in the vocabulary of {vocab_size}"
                raise InvalidRequest(text, field)
        texts = [prompt for prompt in prompts if not isinstance(prompt, list)]
        try:
            async with asyncio.timeout(deadline_s):
                encoded = iter(await deployment.text.encode(texts))
        except TextError as e:
            param = field if e.param == "prompt" else e.param
            raise InvalidRequest(f"{param}: {e.message}", param) from e
        except EngineError as e:
            raise lost(e) from e
        except TimeoutError as e:
            text = f"not tokenized within the deadline of {deadline_s:g} s"
            raise DeadlinePassed(text, code="deadline") from e
        return [prompt if isinstance(prompt, list) else next(encoded) for prompt in prompts]


def _max_tokens(
    deployment: Deployment, prompts: list[list[int]], sampling: Sampling, field: str
) -> int:
    """Returns the limit on new tokens; raises InvalidRequest if prompt and answer do not fit."""
    longest, context = max(map(len, prompts)), deployment.engine.info.max_context
    room, wanted = context - longest, sampling.max_tokens
    if room < 1:
        text = (
            f"the prompt has {longest} tokens, which leaves no room for an answer in the model's"
            f" context of {context}"
        )
        raise InvalidRequest(text, field, "context_length_exceeded")
    if wanted is None:
        return min(room, sampling.default_max_tokens or room)
    if wanted > room:
        name = sampling.max_tokens_field
        text = (
            f"the prompt has {longest} tokens and {name} is {wanted}: together"
            f" {longest + wanted}, but the model's context has {context}"
        )
        raise InvalidRequest(text, name, "context_length_exceeded")
    return wanted


def _check_features(deployment: Deployment, sampling: Sampling, choice: Choice) -> None:
    info = deployment.engine.info
    if sampling.schema is not None and "json_schema" not in info.features:
        text = f"{info.engine} does not support JSON schemas"
        raise InvalidRequest(text, sampling.schema_field, "unsupported")
    for name in choice.extras():
        if name not in info.features:
            raise InvalidRequest(f"{name}: {info.engine} lacks it", name, "unsupported")
    if sampling.logprobs is None:
        return
    if not tells_logprobs(deployment, choice):
        text = f"logprobs: {info.engine} returns none"
        if info.max_logprobs >= 0:
            text += (
                " unless temperature is 0, or temperature and top_p are 1, and top_k, min_p and"
                " repetition_penalty are not used"
            )
        raise InvalidRequest(text, "logprobs", "unsupported")
    if sampling.logprobs > info.max_logprobs:
        text = f"{info.engine} returns at most {max(0, info.max_logprobs)} alternatives a token"
        raise InvalidRequest(text, "logprobs", "unsupported")


def _refusal(rejected: Rejected) -> RequestError:
    reason, retry_s = rejected.reason, rejected.retry_after_s
    if reason == "too_many_sequences":
        return InvalidRequest(str(rejected), "n", reason)
    kind = Unavailable if reason == "draining" else LimitReached
    return kind(str(rejected), None, reason, retry_s)
