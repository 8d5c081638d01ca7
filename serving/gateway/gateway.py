"""The gateway: authorizes a request, encodes its prompts, checks it, and admits it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random

from serving.admission import Admission, DeadlineExpired, Limits, Rejected, Slot
from serving.config import ServingConfig
from serving.deployment import Deployment
from serving.engine import EngineError, EngineInfo, TokenRequest
from serving.errors import (
    DeadlinePassed,
    InvalidRequest,
    LimitReached,
    NotFound,
    RequestError,
    Unauthorized,
    Unavailable,
)
from serving.gateway.generation import Generation, lost
from serving.gateway.request import InferenceRequest
from serving.keys import Key, Keys
from serving.metrics import Metrics
from serving.models import AdaptedModel, Model
from serving.sampling import SamplingParams
from serving.telemetry import Telemetry
from serving.text.codec import TextError

ANYBODY = Key("anonymous", sha256="", created="")


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

    def authorize(self, authorization: str | None, owner: str | None = None) -> Key:
        """Returns the key of a request.

        Args:
            authorization: Credentials of the client: `Bearer sf-...`.
            owner: Id of the key that the request is made for; None: `authorization` decides.

        Raises:
            Unauthorized: The request has no valid key.
        """
        if self.keys is None:
            return ANYBODY
        key = self.keys.find(authorization) if owner is None else self.keys.named(owner)
        if key is None:
            text = "the API key is missing or not valid: send Authorization: Bearer sf-..."
            raise Unauthorized(text, code="invalid_api_key")
        return key

    def model(self, name: str) -> Model | AdaptedModel:
        """Returns a model or adapter by its name.

        Raises:
            NotFound: There is none with that name.
        """
        models = self.models | self.adapted
        model = models.get(name)
        if model is None:
            there = ", ".join(sorted(models))
            text = f"there is no model {name[:64]!r}; there is {there}"
            raise NotFound(text, "model", "model_not_found")
        return model

    async def begin(self, request: InferenceRequest) -> Generation:
        """Encodes the prompts, checks the request, and waits for its slots.

        Raises:
            RequestError: The request is refused, or was not admitted.
        """
        with contextlib.ExitStack() as held:
            # The deployment is picked once: if a rollout replaces it meanwhile, it still finishes
            # this request, since its tokens, limits and defaults were used.
            deployment = held.enter_context(request.model.pick())
            info = deployment.engine.info
            prompts = await self._encode(request, deployment)
            max_tokens = _max_tokens(request, max(map(len, prompts)), info.max_context)
            params = dataclasses.replace(deployment.defaults, **request.sampling)
            _check_features(request, params, info)
            prompt_tokens = sum(map(len, prompts)) * request.n
            slot = await self._admit(request, prompt_tokens, max_tokens, len(prompts) * request.n)
            sequences = _sequences(request, prompts, max_tokens, params)
            # The deployment stays in use until the last chunk, beyond this call.
            return Generation(
                request, deployment, sequences, slot, held.pop_all(), self.metrics, self.telemetry
            )

    async def embed(self, request: InferenceRequest) -> tuple[list[list[float]], int, str]:
        """Returns a vector for each prompt, the number of tokens, and the artifact's version.

        Raises:
            RequestError: The request is refused, was not admitted, or failed.
        """
        with request.model.pick() as deployment:
            info = deployment.engine.info
            if "embeddings" not in info.features:
                raise InvalidRequest(f"{info.engine} has no embeddings", "model", "unsupported")
            tokens = await self._encode(request, deployment)
            if (longest := max(map(len, tokens))) > info.max_context:
                text = f"an input has {longest} tokens, but the context has {info.max_context}"
                raise InvalidRequest(text, request.prompts_field, "context_length_exceeded")
            num_tokens = sum(map(len, tokens))
            slot = await self._admit(request, num_tokens, 0, 1)
            try:
                async with asyncio.timeout(request.left_s):
                    vectors = await deployment.engine.embed(
                        request.id, tokens, request.model.adapter
                    )
            except TimeoutError as e:
                text = f"not finished within the deadline of {request.deadline_s:g} s"
                raise DeadlinePassed(text, code="deadline") from e
            except EngineError as e:
                raise lost(e) from e
            finally:
                slot.release(num_tokens)
            return vectors, num_tokens, request.model.identity(deployment)[0]

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
        self, request: InferenceRequest, prompt_tokens: int, max_tokens: int, sequences: int
    ) -> Slot:
        key, model = request.key, request.model
        try:
            return await self.admission.acquire(
                key.id,
                prompt_tokens,
                max_tokens,
                request.deadline_s,
                sequences,
                request.priority,
                key.limits,
            )
        except Rejected as e:
            self.metrics.rejections.labels(model.name, key.id, e.reason).inc()
            raise _refusal(e) from e
        except DeadlineExpired as e:
            self.metrics.rejections.labels(model.name, key.id, "expired").inc()
            raise DeadlinePassed(str(e), code="deadline", retry_after_s=1) from e

    async def _encode(self, request: InferenceRequest, deployment: Deployment) -> list[list[int]]:
        """Returns the token ids of each prompt."""
        field, vocab_size = request.prompts_field, deployment.text.vocab_size
        for prompt in request.prompts:
            # An engine would index beyond its embedding and crash, losing everybody's requests.
            if isinstance(prompt, list) and (largest := max(prompt)) >= vocab_size:
                text = f"token {largest} is not in the vocabulary of {vocab_size}"
                raise InvalidRequest(text, field)
        texts = [prompt for prompt in request.prompts if not isinstance(prompt, list)]
        try:
            async with asyncio.timeout(request.left_s):
                encoded = iter(await deployment.text.encode(texts))
        except TextError as e:
            param = field if e.param == "prompt" else e.param
            raise InvalidRequest(f"{param}: {e.message}", param) from e
        except EngineError as e:
            raise lost(e) from e
        except TimeoutError as e:
            text = f"not tokenized within the deadline of {request.deadline_s:g} s"
            raise DeadlinePassed(text, code="deadline") from e
        return [p if isinstance(p, list) else next(encoded) for p in request.prompts]


def _max_tokens(request: InferenceRequest, longest: int, context: int) -> int:
    """Returns the limit on new tokens; raises InvalidRequest if prompt and answer do not fit."""
    room, wanted = context - longest, request.max_tokens
    if room < 1:
        text = (
            f"the prompt has {longest} tokens, which leaves no room for an answer in the model's"
            f" context of {context}"
        )
        raise InvalidRequest(text, request.prompts_field, "context_length_exceeded")
    if wanted is None:
        return min(room, request.default_max_tokens or room)
    if wanted > room:
        name = request.max_tokens_field
        text = (
            f"the prompt has {longest} tokens and {name} is {wanted}: together"
            f" {longest + wanted}, but the model's context has {context}"
        )
        raise InvalidRequest(text, name, "context_length_exceeded")
    return wanted


def _check_features(request: InferenceRequest, params: SamplingParams, info: EngineInfo) -> None:
    if request.schema is not None and "json_schema" not in info.features:
        text = f"{info.engine} does not support JSON schemas"
        raise InvalidRequest(text, request.schema_field, "unsupported")
    for name in params.extras():
        if name not in info.features:
            raise InvalidRequest(f"{name}: {info.engine} lacks it", name, "unsupported")
    if request.logprobs is None:
        return
    if not info.tells_logprobs(params):
        text = f"logprobs: {info.engine} returns none"
        if info.max_logprobs >= 0:
            text += (
                " unless temperature is 0, or temperature and top_p are 1, and top_k, min_p and"
                " repetition_penalty are not used"
            )
        raise InvalidRequest(text, "logprobs", "unsupported")
    if request.logprobs > info.max_logprobs:
        text = f"{info.engine} returns at most {max(0, info.max_logprobs)} alternatives a token"
        raise InvalidRequest(text, "logprobs", "unsupported")


def _sequences(
    request: InferenceRequest, prompts: list[list[int]], max_tokens: int, params: SamplingParams
) -> list[TokenRequest]:
    seed = random.getrandbits(63) if request.seed is None else request.seed
    chosen = dataclasses.asdict(params)
    # Every sequence has its own seed, or all choices of a prompt would be the same text.
    return [
        TokenRequest(
            id=f"{request.id}-{i}",
            prompt=prompt,
            max_tokens=max_tokens,
            **chosen,
            seed=seed + i,
            logprobs=request.logprobs,
            ignore_eos=request.ignore_eos,
            schema=request.schema,
            adapter=request.model.adapter,
        )
        for i, prompt in enumerate(prompt for prompt in prompts for _ in range(request.n))
    ]


def _refusal(rejected: Rejected) -> RequestError:
    reason, retry_s = rejected.reason, rejected.retry_after_s
    if reason == "too_many_sequences":
        return InvalidRequest(str(rejected), "n", reason)
    kind = Unavailable if reason == "draining" else LimitReached
    return kind(str(rejected), None, reason, retry_s)
