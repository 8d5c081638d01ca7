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
from serving.engines.torch_worker import Settings, TorchWorker, Unfit, serve

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

        super().__init__(settings, lines, is_plain=False)
        try:
            self._manager = self._make_manager()
        except Exception as e:  # any error concerns this kind of model
            raise Unfit(f"cannot run the model: {(str(e).splitlines() or [''])[0]}") from e
        self._sampler.install(self._manager.logit_processor)
        if self._adapters is not None:
            self._adapters.follow(self._model, self._step)
        # Before the manager starts: its thread reads the model's attention then, and an embedding
        # changes that for a moment.
        embeds = self._embeds_text()
        self._manager.start()
        self._say_ready(f"transformers {transformers.__version__}", settings.max_running, embeds)

    def _make_manager(self) -> Any:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        settings = self._settings
        return self._model.init_continuous_batching(
            # Greedy over the sampler's marks. EOS is set for each request, since one may ignore it.
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE_TOKENS,
                num_blocks=max(settings.kv_cache_tokens, self._max_context) // _PAGE_TOKENS + 1,
                max_batch_tokens=settings.max_batch_tokens,
                max_requests_per_batch=settings.max_running,
                use_cuda_graph=False,  # a graph would replay the sampling of the step it recorded
                use_async_batching=False,  # the sampler's rows must be those of the running step
                # Shared blocks are found by their tokens alone, but the same tokens have other
                # keys and values with another adapter.
                allow_block_sharing=self._adapters is None,
            ),
        )

    def _begin(self, request: TokenRequest) -> None:
        self._manager.add_request(
            request.prompt,
            request_id=request.id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=-1 if request.ignore_eos else self._eos,
        )

    def _cancel(self, name: str) -> None:
        self._manager.cancel_request(name)

    def _advance(self) -> None:
        """Sends all tokens since the last call in one line."""
        tokens: dict[str, tuple[list[int], Any]] = {}
        finished: list[tuple[str, str]] = []
        output = self._manager.get_result(timeout=0.05)
        while output is not None:
            name = output.request_id
            if name in self._told:
                if output.error is not None:
                    if self._manager.background_thread_status.local_status:
                        # The batch is lost, so the process ends and the next one continues its
                        # requests.
                        self._die(output.error)
                    self._forget(name)
                    self._lines.say("failed", {"id": name, "error": output.error})
                else:
                    # An output has all tokens of its request so far, not only the new ones.
                    new = output.generated_tokens[self._told[name] :]
                    self._collect(name, new, output.is_finished(), tokens, finished)
            queue = self._manager.output_router.output_queue
            output = None if queue.empty() else self._manager.get_result(timeout=0)
        self._say_step(tokens, finished)

    def _check(self) -> None:
        if not self._manager.is_running():
            self._die(self._manager.background_thread_status.fatal_error)

    def _paused(self) -> AbstractContextManager[None]:
        paused: AbstractContextManager[None] = self._manager.pause()
        return paused

    def _step(self) -> list[tuple[int, str | None]]:
        """Returns the number of tokens and the adapter of each request of the coming step."""
        processor = self._manager.batch_processor
        assert processor is not None
        requests = processor.inputs_and_outputs.requests_in_batch
        asked = [(r.query_length, self._requests.get(r.state.request_id)) for r in requests]
        # A request that was cancelled in the meantime has no adapter here; its tokens and cache
        # are not read, so the base will do.
        return [(length, None if one is None else one.adapter) for length, one in asked]

    def _kv_cache_usage(self) -> float:
        processor = self._manager.batch_processor
        if processor is None:
            return 0.0
        cache = processor.cache
        free_bytes = cache.compute_free_capacity(relative=False)
        for allocator in cache.cache_allocators.values():
            # Blocks of finished prompts are kept for reuse, and given up when space is needed.
            free_bytes += len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
        return round(1 - float(free_bytes / (cache.num_sectors * cache.bytes_per_sector)), 4)


if __name__ == "__main__":
    serve(TransformersWorker, sys.argv[1:])
