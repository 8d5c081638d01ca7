"""Holds what the engine programs use of transformers beyond its documented interface.

The names are looked up when this file is imported, so that a version of transformers that lacks one
is refused with a line at the start, and does not fail in the middle of a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from inspect import isfunction
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel

from core.errors import ConfigError
from serving.engine import TokenRequest
from serving.engines.sampler import Row, Sampler

KNOWN = "5.23.0"  # version of transformers that the tests run with


def _refuse(what: object) -> ConfigError:
    rule = f"it lacks what the engine uses: {what}"
    return ConfigError("transformers", transformers.__version__, rule, f"install {KNOWN}")


try:
    from transformers import ContinuousBatchingConfig
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.cache_allocators.cache_allocator import (
        BlockLedger,
        CacheAllocator,
    )
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
        ContinuousBatchingLogitsProcessorList,
    )
    from transformers.generation.continuous_batching.continuous_api import (
        BackgroundThreadStatus,
        ContinuousBatchingManager,
        ContinuousBatchProcessor,
        OutputRouter,
    )
    from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
    from transformers.generation.continuous_batching.requests import (
        FutureRequestState,
        GenerationOutput,
        RequestState,
    )
except ImportError as e:
    raise _refuse(e) from e

_NEEDED: dict[type, Sequence[str]] = {
    PreTrainedModel: ("_can_set_attn_implementation",),
    GenerationMixin: (
        *("_supports_logits_to_keep", "_update_model_kwargs_for_generation"),
        "init_continuous_batching",
    ),
    PreTrainedConfig: ("_attn_implementation",),
    ContinuousBatchingManager: (
        *("add_request", "cancel_request", "get_result", "is_running", "pause", "start"),
        *("background_thread_status", "batch_processor", "logit_processor", "output_router"),
    ),
    BackgroundThreadStatus: ("fatal_error", "local_status"),
    OutputRouter: ("output_queue",),
    ContinuousBatchProcessor: ("cache", "inputs_and_outputs"),
    ContinuousBatchingIOs: ("requests_in_batch",),
    ContinuousBatchingLogitsProcessor: ("fill_defaults", "prepare_tensor_args"),
    ContinuousBatchingLogitsProcessorList: (
        *("do_processing", "logits_processor", "tensors_required"),
    ),
    FutureRequestState: ("query_length", "state"),
    RequestState: ("generated_tokens", "initial_tokens", "request_id"),
    GenerationOutput: ("error", "generated_tokens", "is_finished", "request_id"),
    PagedAttentionCache: (
        *("bytes_per_sector", "cache_allocators", "compute_free_capacity", "num_sectors"),
    ),
    CacheAllocator: ("bytes_per_block", "ledger"),
    BlockLedger: ("cached_blocks",),
}


def check_names(needed: dict[type, Sequence[str]] = _NEEDED) -> None:
    """Raises ConfigError if a class has not all that is needed of it.

    Args:
        needed: Names of attributes and methods, by class.
    """
    for owner, names in needed.items():
        # Attributes of instances are not in the class, but are mentioned in a method's code.
        methods = [method for method in vars(owner).values() if isfunction(method)]
        mentioned = {name for method in methods for name in method.__code__.co_names}
        for name in names:
            if not hasattr(owner, name) and name not in mentioned:
                raise _refuse(f"{owner.__module__}.{owner.__name__}.{name}")


check_names()


def attention_of(model: Any) -> str:
    """Returns the name of the attention that a model computes with."""
    name: str = model.config._attn_implementation
    return name


def can_set_attention(model: Any) -> bool:
    """Returns whether a model can change its attention; some fix it when they are built."""
    return bool(model._can_set_attn_implementation())


def can_leave_logits_out(model: Any) -> bool:
    """Returns whether a model's forward takes `logits_to_keep`."""
    return bool(model._supports_logits_to_keep())


def inputs_after(model: Any, outputs: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs of a model's next forward, with the cache of the one before."""
    updated: dict[str, Any] = model._update_model_kwargs_for_generation(outputs, inputs)
    return updated


class ContinuousBatching:
    """transformers' continuous batching of a model, which generates in a thread of its own.

    Args:
        model: Model that generates.
        sampler: Sampler that chooses each token.
        settings: Fields of `ContinuousBatchingConfig`.
    """

    def __init__(self, model: Any, sampler: Sampler, **settings: Any) -> None:
        self._manager: Any = model.init_continuous_batching(
            # Greedy over the chooser's marks. EOS is set for each request, since one may ignore it.
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                use_cuda_graph=False,  # a graph would replay the sampling of the step it recorded
                use_async_batching=False,  # the chooser's rows must be those of the running step
                **settings,
            ),
        )
        processors = self._manager.logit_processor
        # transformers' own processors would apply one request's settings to the whole batch.
        processors.logits_processor = LogitsProcessorList([_Chooser(sampler)])
        processors.tensors_required = 1
        processors.do_processing = True

    def start(self) -> None:
        """Starts the thread."""
        self._manager.start()

    def add(self, request: TokenRequest, eos: list[int]) -> None:
        """Starts a request, which ends with one of the tokens `eos` unless it ignores them."""
        self._manager.add_request(
            request.prompt,
            request_id=request.id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=-1 if request.ignore_eos else eos,
        )

    def cancel(self, name: str) -> None:
        """Ends a request early."""
        self._manager.cancel_request(name)

    def outputs(self) -> Iterator[GenerationOutput]:
        """Yields the outputs of all requests that are there, after a moment if there are none."""
        output = self._manager.get_result(timeout=0.05)
        while output is not None:
            yield output
            queue = self._manager.output_router.output_queue
            output = None if queue.empty() else self._manager.get_result(timeout=0)

    @property
    def is_lost(self) -> bool:
        """True if the thread was told to stop, e.g. because a step failed."""
        return bool(self._manager.background_thread_status.local_status)

    @property
    def is_running(self) -> bool:
        """True if the thread runs."""
        return bool(self._manager.is_running())

    @property
    def fatal_error(self) -> object:
        """Error that has ended the thread."""
        return self._manager.background_thread_status.fatal_error

    def paused(self) -> AbstractContextManager[None]:
        """Stops generation within the context."""
        paused: AbstractContextManager[None] = self._manager.pause()
        return paused

    def step(self) -> list[tuple[int, str]]:
        """Returns the number of tokens and the id of each request of the coming step."""
        requests = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        return [(request.query_length, request.state.request_id) for request in requests]

    def kv_cache_usage(self) -> float:
        """Returns the share of the KV cache that is in use, 0 to 1."""
        processor = self._manager.batch_processor
        if processor is None:
            return 0.0
        cache = processor.cache
        free_bytes = cache.compute_free_capacity(relative=False)
        for allocator in cache.cache_allocators.values():
            # Blocks of finished prompts are kept for reuse, and given up when space is needed.
            free_bytes += len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
        return round(1 - float(free_bytes / (cache.num_sectors * cache.bytes_per_sector)), 4)


class _Chooser(ContinuousBatchingLogitsProcessor):
    """Marks the token that a sampler chooses for the argmax that transformers takes afterwards."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._rows: list[Row] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Zeroes the tensor, since the sampler keeps no state of requests in tensors."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Notes which requests the rows of the next call belong to."""
        self._rows = [future.state for future in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Returns scores, (N, V), in which only the chosen token of a row is finite."""
        chosen = self._sampler(scores, self._rows)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.unsqueeze(1), 0.0)
