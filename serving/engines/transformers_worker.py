"""transformers' continuous batching as an engine program, for any artifact on a CPU or a GPU.

    python -m serving.engines.transformers_worker '{"folder": "runs/demo/export", ...}'

Generation runs in transformers' own thread; the main thread talks to the gateway.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

from core.process.json_lines import JsonLines
from serving.engine import TokenRequest
from serving.engines.loading import Settings
from serving.engines.torch_worker import TorchWorker, Unfit, serve

_PAGE_TOKENS = 32  # tokens of a page of the KV cache


class TransformersWorker(TorchWorker):
    """The engine program with continuous batching.

    Args:
        settings: Settings of the program.
        lines: Connection to the gateway.

    Raises:
        Unfit: Continuous batching does not support the model.
    """

    def __init__(self, settings: Settings, lines: JsonLines) -> None:
        import transformers

        from serving.engines.forwards import embeds_text
        from serving.engines.internals import ContinuousBatching

        super().__init__(settings, lines, is_plain=False)
        try:
            self._batching = ContinuousBatching(
                self._model,
                self._sampler,
                page_size=_PAGE_TOKENS,
                num_blocks=max(settings.kv_cache_tokens, self._max_context) // _PAGE_TOKENS + 1,
                max_batch_tokens=settings.max_batch_tokens,
                max_requests_per_batch=settings.max_running,
                # Shared blocks are found by their tokens alone, but the same tokens have other
                # keys and values with another adapter.
                allow_block_sharing=self._adapters is None,
            )
        except Exception as e:  # any error concerns this kind of model
            raise Unfit(f"cannot run the model: {(str(e).splitlines() or [''])[0]}") from e
        if self._adapters is not None:
            self._adapters.follow(self._model, self._step)
        # Before the thread starts: it reads the model's attention then, and an embedding changes
        # that for a moment.
        embeds = embeds_text(self._model)
        self._batching.start()
        self._say_ready(f"transformers {transformers.__version__}", settings.max_running, embeds)

    def _begin(self, request: TokenRequest) -> None:
        self._batching.add(request, self._eos)

    def _cancel(self, name: str) -> None:
        self._batching.cancel(name)

    def _advance(self) -> None:
        """Sends all tokens since the last call in one line."""
        tokens: dict[str, tuple[list[int], Any]] = {}
        finished: list[tuple[str, str]] = []
        for output in self._batching.outputs():
            name = output.request_id
            if name not in self._told:
                continue
            if output.error is None:
                # An output has all tokens of its request so far, not only the new ones.
                new = output.generated_tokens[self._told[name] :]
                self._collect(name, new, output.is_finished(), tokens, finished)
            elif self._batching.is_lost:
                # The process ends, and the next one continues the batch's requests.
                self._die(output.error)
            else:
                self._forget(name)
                self._lines.say("failed", {"id": name, "error": output.error})
        self._say_step(tokens, finished)

    def _check(self) -> None:
        if not self._batching.is_running:
            self._die(self._batching.fatal_error)

    def _paused(self) -> AbstractContextManager[None]:
        return self._batching.paused()

    def _step(self) -> list[tuple[int, str | None]]:
        """Returns the number of tokens and the adapter of each request of the coming step."""
        step = [(count, self._requests.get(name)) for count, name in self._batching.step()]
        # A request that was cancelled in the meantime has no adapter here; its tokens and cache
        # are not read, so the base will do.
        return [(count, None if one is None else one.adapter) for count, one in step]

    def _kv_cache_usage(self) -> float:
        return self._batching.kv_cache_usage()


if __name__ == "__main__":
    serve(TransformersWorker, sys.argv[1:])
