"""An admitted request: its sequences, deadline, metrics and logs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator

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
from serving.gateway.request import InferenceRequest
from serving.metrics import Metrics
from serving.telemetry import Telemetry
from serving.text.codec import Chat, TextChunk

Chunks = AsyncGenerator[tuple[int, TextChunk], None]  # the number of the choice, and its text


class Generation:
    """An admitted request: its sequences, deadline, metrics and logs.

    Args:
        sequences: Requests of its sequences, those of a prompt one after another.
        slot: Right to run the sequences, which is given back at the end.
        held: Contexts that are left at the end, among them the deployment's.
        metrics: Metrics of the server.
        telemetry: Logs of requests.

    Attributes:
        request: Request as the client sent it.
        deployment: Deployment that answers it.
        version: Version of the deployment's artifact, and of the adapter.
        prompt_tokens: Tokens of all prompts.
        completion_tokens: Tokens of all choices that were generated so far.
    """

    def __init__(
        self,
        request: InferenceRequest,
        deployment: Deployment,
        sequences: list[TokenRequest],
        slot: Slot,
        held: contextlib.ExitStack,
        metrics: Metrics,
        telemetry: Telemetry,
    ) -> None:
        prompts = [sequence.prompt for sequence in sequences[:: request.n]]
        self.request, self.deployment = request, deployment
        self.version, self._digest = request.model.identity(deployment)
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0
        self._sequences, self._slot, self._held = sequences, slot, held
        self._metrics, self._telemetry = metrics, telemetry
        self._drift = telemetry.sample(prompts)
        # The drift file needs log-probabilities also where the client has not asked for any.
        tells = deployment.engine.info.tells_logprobs(sequences[0])
        if request.logprobs is None and self._drift is not None and tells:
            self._sequences = [dataclasses.replace(s, logprobs=0) for s in sequences]
        self._transcript = telemetry.transcript(request.prompts, len(sequences))
        self._started_s = time.monotonic()
        self._first_s: float | None = None
        self._labels = (request.model.name, self.version, request.key.id)
        self._between = metrics.between_tokens.labels(*self._labels)
        self._generated = metrics.generation_tokens.labels(*self._labels)

    async def chunks(self) -> Chunks:
        """Yields (choice, text) until all choices have ended; closing early cancels the rest.

        Raises:
            RequestError: The engine refused or lost the request, or its deadline has passed.
        """
        request, metrics = self.request, self._metrics
        metrics.queue.labels(*self._labels).observe(self._started_s - request.arrived_s)
        metrics.prompt_tokens.labels(*self._labels).inc(self.prompt_tokens)
        reasons: list[str] = []
        error: RequestError | None = None
        is_over = False
        with self._held:
            try:
                last_s: dict[int, float] = {}
                async with contextlib.aclosing(self._stream()) as stream:
                    async for index, chunk in stream:
                        self._note(index, chunk, last_s)
                        if chunk.finish_reason is not None:
                            reasons.append(chunk.finish_reason)
                        if request.logprobs is None and chunk.logprobs is not None:
                            chunk = chunk._replace(logprobs=None)  # only the drift file asked
                        yield index, chunk
                is_over = True
            except TimeoutError as e:
                text = f"not finished within the deadline of {request.deadline_s:g} s"
                error = DeadlinePassed(text, code="deadline")
                raise error from e
            except EngineError as e:
                error = lost(e, None if request.schema is None else request.schema_field)
                raise error from e
            finally:
                self._close(reasons, error, is_over)

    async def _stream(self) -> Chunks:
        """Yields the chunks of all sequences as they come; raises EngineError, TimeoutError.

        The deadline is an item in the queue. `asyncio.timeout` would not do: it cancels the task
        that entered it, but the first chunk is read in another task than the rest.
        """
        queue: asyncio.Queue[tuple[int, TextChunk] | Exception] = asyncio.Queue()
        prompt, stop = self.request.prompts[0], self.request.stop
        finds_calls = isinstance(prompt, Chat) and prompt.finds_calls
        call_format = self.deployment.text.call_format if finds_calls else None
        shown = () if call_format is None else call_format.marks

        async def run(index: int, sequence: TokenRequest) -> None:
            try:
                async for chunk in self.deployment.generate(sequence, stop, shown):
                    queue.put_nowait((index, chunk))
            except EngineError as e:
                queue.put_nowait(e)

        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.request.left_s, queue.put_nowait, TimeoutError())
        tasks = [asyncio.create_task(run(i, s)) for i, s in enumerate(self._sequences)]
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
                self._first_s = now_s - self.request.arrived_s
                self._metrics.first_token.labels(*self._labels).observe(self._first_s)
        if self._drift is not None:
            self._drift.add(chunk)
        if self._transcript is not None:
            self._transcript.add(index, chunk)

    def _close(self, reasons: list[str], error: RequestError | None, is_over: bool) -> None:
        request, metrics = self.request, self._metrics
        took_s = time.monotonic() - request.arrived_s
        self._slot.release(self.prompt_tokens * request.n + self.completion_tokens)
        for reason in reasons:
            metrics.success.labels(*self._labels, reason).inc()
        is_clients = isinstance(error, InvalidRequest | LimitReached)  # the client's fault
        if is_clients:
            metrics.rejections.labels(request.model.name, request.key.id, "refused").inc()
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
            request.model.note(self.deployment.artifact.version, error is None, first_s, token_s)
        status = "ok" if is_over else "cancelled" if error is None else (error.code or "error")
        self._telemetry.request(
            self._transcript,
            id=request.id,
            key=request.key.id,
            model=request.model.name,
            artifact=self._digest,
            status=status,
            finish_reasons=reasons,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            queue_s=round(self._started_s - request.arrived_s, 6),
            first_token_s=None if self._first_s is None else round(self._first_s, 6),
            total_s=round(took_s, 6),
        )
        if self._drift is not None and is_over:
            self._telemetry.drift(request.id, self._digest, self._drift)


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
