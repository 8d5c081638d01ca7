"""An admitted request: its sequences, deadline, metrics and logs."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from serving.admission import Slot
from serving.deployment import Deployment
from serving.engine import EngineError, EngineFailed, EngineRefused, TokenRequest
from serving.errors import (
    DeadlinePassed,
    InvalidRequest,
    LimitReached,
    RequestError,
    RequestFailed,
    Unavailable,
)
from serving.keys import Key
from serving.metrics import Metrics
from serving.models import AdaptedModel, Model
from serving.sampling import Choice
from serving.telemetry import Telemetry, Transcript
from serving.text.codec import TextChunk


@dataclass(frozen=True)
class Sampling:
    """Settings of a request besides its prompts; see `TokenRequest`.

    Attributes:
        max_tokens: New tokens of each sequence, at most; None: not given.
        max_tokens_field: Field of the request with that limit.
        default_max_tokens: Limit if none is given, reduced to what fits; None: what fits.
        choice: Fields of `Choice` by name; None: not given.
        n: Sequences for each prompt.
        seed: Seed of the first sequence; None: a random one.
        logprobs: Alternatives for each token; None: no log-probabilities.
        stop: Texts that end a sequence.
        ignore_eos: True: generate up to the limit even after an EOS.
        schema: JSON schema that the text must satisfy; None: any text.
        schema_field: Field of the request with the schema.
        finds_calls: True: calls of tools are parsed out of the text.
    """

    max_tokens: int | None
    max_tokens_field: str
    default_max_tokens: int | None
    choice: dict[str, float | None]
    n: int
    seed: int | None
    logprobs: int | None
    stop: list[str]
    ignore_eos: bool
    schema: dict[str, object] | None
    schema_field: str
    finds_calls: bool = False


class Generation:
    """An admitted request: its sequences, deadline, metrics and logs.

    Attributes:
        id: Unique id, which is in the response and in each line of the logs.
        deployment: Deployment that answers the request.
        version: Version of the deployment's artifact, and of the adapter.
        prompt_tokens: Tokens of all prompts.
        completion_tokens: Tokens of all choices that were generated so far.
    """

    def __init__(
        self,
        metrics: Metrics,
        telemetry: Telemetry,
        key: Key,
        model: Model | AdaptedModel,
        deployment: Deployment,
        prompts: list[list[int]],
        max_tokens: int,
        sampling: Sampling,
        choice: Choice,
        slot: Slot,
        arrived_s: float,
        deadline_s: float,
        transcript: Transcript | None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.deployment = deployment
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0
        self._metrics, self._telemetry = metrics, telemetry
        self._key, self._model = key, model
        self._prompts, self._max_tokens = prompts, max_tokens
        self._sampling, self._choice = sampling, choice
        self._slot, self._arrived_s, self._deadline_s = slot, arrived_s, deadline_s
        self._started_s = time.monotonic()
        self._first_s: float | None = None
        self._drift, self._transcript = telemetry.sample(prompts), transcript
        self.version, self._digest = model.identity(deployment)
        labels = (model.name, self.version, key.id)
        self._between = metrics.between_tokens.labels(*labels)
        self._generated = metrics.generation_tokens.labels(*labels)
        self._labels = labels
        # Entered here and left in `_close`: the deployment must stay up from the end of `begin`
        # until the last chunk, which another task may read.
        deployment.__enter__()

    async def chunks(self) -> AsyncIterator[tuple[int, TextChunk]]:
        """Yields (choice, text) until all choices have ended; closing early cancels the rest.

        Raises:
            RequestError: The engine refused or lost the request, or its deadline has passed.
        """
        metrics = self._metrics
        metrics.queue.labels(*self._labels).observe(self._started_s - self._arrived_s)
        metrics.prompt_tokens.labels(*self._labels).inc(self.prompt_tokens)
        reasons: list[str] = []
        error: RequestError | None = None
        is_over = False
        try:
            stream = self._stream(self._requests())
            last_s: dict[int, float] = {}
            try:
                async for index, chunk in stream:
                    self._note(index, chunk, last_s)
                    if chunk.finish_reason is not None:
                        reasons.append(chunk.finish_reason)
                    if self._sampling.logprobs is None and chunk.logprobs is not None:
                        chunk = chunk._replace(logprobs=None)  # asked for by the drift file only
                    yield index, chunk
            finally:
                await stream.aclose()  # type: ignore[attr-defined]
            is_over = True
        except TimeoutError as e:
            text = f"not finished within the deadline of {self._deadline_s:g} s"
            error = DeadlinePassed(text, code="deadline")
            raise error from e
        except EngineError as e:
            field = None if self._sampling.schema is None else self._sampling.schema_field
            error = lost(e, field)
            raise error from e
        finally:
            self._close(reasons, error, is_over)

    def _requests(self) -> list[TokenRequest]:
        sampling = self._sampling
        seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
        logprobs = sampling.logprobs
        # The drift file needs log-probabilities also where the client has not asked for any.
        if (
            logprobs is None
            and self._drift is not None
            and tells_logprobs(self.deployment, self._choice)
        ):
            logprobs = 0
        # Every sequence has its own seed, or all choices of a prompt would be the same text.
        return [
            TokenRequest(
                id=f"{self.id}-{i * sampling.n + j}",
                prompt=prompt,
                max_tokens=self._max_tokens,
                **dataclasses.asdict(self._choice),
                seed=seed + i * sampling.n + j,
                logprobs=logprobs,
                ignore_eos=sampling.ignore_eos,
                schema=sampling.schema,
                adapter=self._model.adapter,
            )
            for i, prompt in enumerate(self._prompts)
            for j in range(sampling.n)
        ]

    async def _stream(self, requests: list[TokenRequest]) -> AsyncIterator[tuple[int, TextChunk]]:
        """Yields the chunks of all sequences as they come; raises EngineError, TimeoutError.

        The deadline is an item in the queue. `asyncio.timeout` would not do: it cancels the task
        that entered it, but the first chunk is read in another task than the rest.
        """
        queue: asyncio.Queue[tuple[int, TextChunk] | Exception] = asyncio.Queue()

        call_format = self.deployment.text.call_format if self._sampling.finds_calls else None
        shown = () if call_format is None else call_format.marks

        async def run(index: int, request: TokenRequest) -> None:
            try:
                async for chunk in self.deployment.generate(request, self._sampling.stop, shown):
                    queue.put_nowait((index, chunk))
            except EngineError as e:
                queue.put_nowait(e)

        left_s = self._arrived_s + self._deadline_s - time.monotonic()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(left_s, queue.put_nowait, TimeoutError())
        tasks = [asyncio.create_task(run(i, request)) for i, request in enumerate(requests)]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                left -= item[1].finish_reason is not None
                yield item
        finally:
            timer.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _note(self, index: int, chunk: TextChunk, last_s: dict[int, float]) -> None:
        now_s = time.monotonic()
        if chunk.num_tokens:
            self.completion_tokens += chunk.num_tokens
            self._generated.inc(chunk.num_tokens)
            if index in last_s:
                self._between.observe((now_s - last_s[index]) / chunk.num_tokens)
            last_s[index] = now_s
            if self._first_s is None:
                self._first_s = now_s - self._arrived_s
                self._metrics.first_token.labels(*self._labels).observe(self._first_s)
        if self._drift is not None:
            self._drift.add(chunk)
        if self._transcript is not None:
            self._transcript.add(index, chunk)

    def _close(self, reasons: list[str], error: RequestError | None, is_over: bool) -> None:
        took_s = time.monotonic() - self._arrived_s
        # Called exactly once, however the request ends: it frees the deployment and the slot.
        self.deployment.__exit__()
        self._slot.release(self.prompt_tokens * self._sampling.n + self.completion_tokens)
        metrics = self._metrics
        for reason in reasons:
            metrics.success.labels(*self._labels, reason).inc()
        is_clients = isinstance(error, InvalidRequest | LimitReached)  # the client's fault
        if is_clients:
            metrics.rejections.labels(self._model.name, self._key.id, "refused").inc()
        elif error is not None:
            metrics.failed.labels(*self._labels).inc()
        elif not is_over:
            metrics.cancelled.labels(*self._labels).inc()
        else:
            metrics.whole.labels(*self._labels).observe(took_s)
        first_s = took_s if self._first_s is None else self._first_s
        # A trial counts no requests that were cancelled or refused: they say nothing about the
        # artifact.
        if is_over or (error is not None and not is_clients):
            token_s = (took_s - first_s) / max(1, self.completion_tokens - 1)
            self._model.note(self.deployment.artifact.version, error is None, first_s, token_s)
        status = "ok" if is_over else "cancelled" if error is None else (error.code or "error")
        self._telemetry.request(
            self._transcript,
            id=self.id,
            key=self._key.id,
            model=self._model.name,
            artifact=self._digest,
            status=status,
            finish_reasons=reasons,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            queue_s=round(self._started_s - self._arrived_s, 6),
            first_token_s=None if self._first_s is None else round(self._first_s, 6),
            total_s=round(took_s, 6),
        )
        if self._drift is not None and is_over:
            self._telemetry.drift(self.id, self._digest, self._drift)


def tells_logprobs(deployment: Deployment, choice: Choice) -> bool:
    """Returns whether the engine returns the model's own log-probabilities with these settings."""
    info = deployment.engine.info
    if info.max_logprobs < 0:
        return False
    return choice.is_models_own or "logprobs_when_sampling" in info.features


def lost(error: EngineError, schema_field: str | None = None) -> RequestError:
    """Returns the response to a request that an engine lost, refused, or failed at."""
    if isinstance(error, EngineFailed):
        return RequestFailed(f"the engine failed: {error}", code="engine_failed")
    if not isinstance(error, EngineRefused):
        text = f"the engine lost the request: {error}"
        return Unavailable(text, code="engine", retry_after_s=1)
    if error.retry_after_s is not None:
        text = f"the engine is busy: {error}"
        return LimitReached(text, code="engine_busy", retry_after_s=error.retry_after_s)
    if schema_field is not None:
        return InvalidRequest(f"{schema_field}: {error}", schema_field, "schema_refused")
    return InvalidRequest(f"the engine refuses the request: {error}", code="unsupported")
