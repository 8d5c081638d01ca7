"""transformers' continuous batching as an engine program: any artifact, on a CPU or a GPU.

    python -m serving.engines.transformers_worker '{"folder": "runs/demo/export", ...}'

Generation runs in transformers' own thread; this one listens and tells.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

from core.process.json_lines import JsonLines
from serving.engines.torch_worker import Settings, TorchWorker, Unfit, serve

_PAGE_TOKENS = 32  # of the KV cache


class TransformersWorker(TorchWorker):
    """The program.

    Args:
        settings: Of the program.
        lines: To the gateway.

    Raises:
        Unfit: Continuous batching does not take such a model.
    """

    def __init__(self, settings: Settings, lines: JsonLines) -> None:
        import transformers

        super().__init__(settings, lines, is_plain=False)
        try:
            self._manager = self._make_manager()
        except Exception as e:  # whatever it is, it is about this kind of model
            raise Unfit(f"does not run it: {(str(e).splitlines() or [''])[0]}") from e
        self._sampler.install(self._manager.logit_processor)
        if self._adapters is not None:
            self._adapters.follow(self._model, self._step)
        # Asked first: its thread looks at the model's attention when it starts, and an embedding
        # changes that for a moment.
        embeds = self._embeds_text()
        self._manager.start()
        self._say_ready(f"transformers {transformers.__version__}", settings.max_running, embeds)

    def _make_manager(self) -> Any:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        settings = self._settings
        return self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE_TOKENS,
                num_blocks=max(settings.kv_cache_tokens, self._max_context) // _PAGE_TOKENS + 1,
                max_batch_tokens=settings.max_batch_tokens,
                max_requests_per_batch=settings.max_running,
                use_cuda_graph=False,  # a graph would replay one step's sampling for all requests
                use_async_batching=False,  # the sampler's rows are those of the step that runs
                # Blocks are found by their tokens, which have other keys and values by adapter.
                allow_block_sharing=self._adapters is None,
            ),
        )

    def _begin(self, request: dict[str, Any]) -> None:
        self._manager.add_request(
            request["prompt"],
            request_id=request["id"],
            max_new_tokens=request["max_tokens"],
            streaming=True,
            eos_token_id=-1 if request["ignore_eos"] else self._eos,
        )

    def _cancel(self, name: str) -> None:
        self._manager.cancel_request(name)

    def _advance(self) -> None:
        """Tells all tokens since the last time, in one line."""
        tokens: dict[str, tuple[list[int], Any]] = {}
        finished: list[tuple[str, str]] = []
        output = self._manager.get_result(timeout=0.05)
        while output is not None:
            name = output.request_id
            if name in self._told:
                if output.error is not None:
                    if self._manager.background_thread_status.local_status:
                        self._die(output.error)  # all are lost here, and taken up by the next
                    self._forget(name)
                    self._lines.say("failed", {"id": name, "error": output.error})
                else:
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
        """Tokens and adapter of each request of the step that is about to be made."""
        processor = self._manager.batch_processor
        assert processor is not None
        requests = processor.inputs_and_outputs.requests_in_batch
        # One that was cancelled since may go to the base: nobody reads its tokens, or its cache.
        return [(r.query_length, self._adapter_of.get(r.state.request_id)) for r in requests]

    def _kv_cache_usage(self) -> float:
        processor = self._manager.batch_processor
        if processor is None:
            return 0.0
        cache = processor.cache
        free_bytes = cache.compute_free_capacity(relative=False)
        for allocator in cache.cache_allocators.values():
            # Of prompts that may come again; given up as soon as the room is needed.
            free_bytes += len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
        return round(1 - float(free_bytes / (cache.num_sectors * cache.bytes_per_sector)), 4)


if __name__ == "__main__":
    serve(TransformersWorker, sys.argv[1:])
