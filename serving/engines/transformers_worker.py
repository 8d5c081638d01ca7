"""transformers' continuous batching as an engine program: any artifact, on a CPU or a GPU.

    python -m serving.engines.transformers_worker '{"folder": "runs/demo/export", ...}'

It speaks the lines of `serving/engine.py`. Generation runs in transformers' own thread; this one
listens and tells.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from monitoring.errors import ConfigError
from serving.adapters import key_of, resolve
from serving.engines.lines import IDLE_S, Lines

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from serving.engines.grammars import Grammars


@dataclass(frozen=True)
class Settings:
    """Of the program.

    Attributes:
        folder: Of the artifact.
        target: What the compression packed it for; None: a plain Hugging Face folder.
        max_context: Tokens of prompt and answer together, at most; None: what the model can.
        max_running: Sequences in a step, at most.
        max_batch_tokens: Tokens in a step, at most: longer prompts are cut into several steps.
        kv_cache_tokens: Room for keys and values, in tokens of all sequences together.
        num_threads: Of torch on a CPU; None: its own choice.
        adapters: Folder and digest of each LoRA adapter, by name.
    """

    folder: str
    target: str | None
    max_context: int | None
    max_running: int
    max_batch_tokens: int
    kv_cache_tokens: int
    num_threads: int | None
    adapters: dict[str, tuple[str, str]] = field(default_factory=dict)


class Worker:
    """The program."""

    def __init__(self, settings: Settings, lines: Lines) -> None:
        import torch
        import transformers
        from transformers import (
            AutoTokenizer,
            ContinuousBatchingConfig,
            GenerationConfig,
            PreTrainedTokenizerFast,
        )

        from serving.engines.grammars import Grammars
        from serving.engines.sampler import Sampler
        from trainer.cpu import keep_freed_memory

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        keep_freed_memory()  # else some processes spend a third of their CPU time on page faults
        self._lines = lines
        self._model = model = _load(settings)
        text_config = model.config.get_text_config()
        self._eos = _eos_tokens(model)
        trained = getattr(text_config, "max_position_embeddings", None) or 1 << 20
        self._max_context = min(settings.max_context or trained, trained)
        page_size = 32
        self._sampler = Sampler(self._eos)
        self._adapters = _adapters(settings, model)
        self._adapter_of: dict[str, str | None] = {}  # by request
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page_size,
                num_blocks=max(settings.kv_cache_tokens, self._max_context) // page_size + 1,
                max_batch_tokens=settings.max_batch_tokens,
                max_requests_per_batch=settings.max_running,
                use_cuda_graph=False,  # a graph would replay one step's sampling for all requests
                use_async_batching=False,  # the sampler's rows are those of the step that runs
                # Blocks are found by their tokens, which have other keys and values by adapter.
                allow_block_sharing=self._adapters is None,
            ),
        )
        self._sampler.install(self._manager.logit_processor)
        if self._adapters is not None:
            self._adapters.follow(model, self._step)
        self._told: dict[str, int] = {}  # tokens that were told, by request
        self._compiling: dict[str, dict[str, Any]] = {}  # requests whose schema is being compiled
        self._embeds: dict[str, dict[str, Any]] = {}  # requests with what is left of their inputs
        self._grammars: Grammars | None = None
        features = ["embeddings", "logprobs_when_sampling"]
        features += ["top_k", "min_p", "repetition_penalty"]  # the sampler's
        tokenizer = AutoTokenizer.from_pretrained(settings.folder, trust_remote_code=False)
        if self._eos and isinstance(tokenizer, PreTrainedTokenizerFast):
            vocab_size = text_config.vocab_size
            self._grammars = Grammars(tokenizer, vocab_size, self._eos, self._on_grammar)
            features.append("json_schema")
        info = {
            "engine": f"transformers {transformers.__version__}",
            "max_context": self._max_context,
            "max_running": settings.max_running,
            "features": features,
        }
        self._manager.start()
        lines.say("ready", info)

    def run(self) -> None:
        """Until the gateway is gone, or generation broke down."""
        while True:
            is_generating = len(self._told) > len(self._compiling)
            waits = 0 if is_generating or self._embeds else IDLE_S
            for kind, content in self._lines.heard(waits):
                getattr(self, f"_on_{kind}")(content)
            if self._embeds:
                self._embed_one()
            if is_generating:
                self._tell()
            elif not self._embeds:
                self._lines.say("idle", {"kv_cache_usage": self._kv_cache_usage()})
            if not self._manager.is_running():
                self._die(self._manager.background_thread_status.fatal_error)

    def _on_submit(self, request: dict[str, Any]) -> None:
        self._told[request["id"]] = 0
        self._adapter_of[request["id"]] = request["adapter"]
        if request["schema"] is None:
            self._begin(request, None)
        elif self._grammars is None:
            self._refuse(request["id"], "this engine takes no JSON schema")
        else:
            self._compiling[request["id"]] = request
            self._grammars.compile(request["id"], request["schema"])

    def _on_grammar(self, name: str, found: LLMatcher | str) -> None:
        """On the thread of the grammars."""
        self._lines.post("compiled", (name, found))

    def _on_compiled(self, told: tuple[str, LLMatcher | str]) -> None:
        name, found = told
        request = self._compiling.pop(name, None)
        if request is None:
            return  # cancelled since
        if isinstance(found, str):
            self._refuse(name, found)
        else:
            self._begin(request, found)

    def _refuse(self, name: str, why: str) -> None:
        self._forget(name)
        self._lines.say("refused", {"id": name, "error": why})

    def _begin(self, request: dict[str, Any], matcher: LLMatcher | None) -> None:
        name = request["id"]
        self._sampler.add(request, matcher)
        self._manager.add_request(
            request["prompt"],
            request_id=name,
            max_new_tokens=request["max_tokens"],
            streaming=True,
            eos_token_id=-1 if request["ignore_eos"] else self._eos,
        )

    def _on_cancel(self, name: str) -> None:
        self._embeds.pop(name, None)
        if name not in self._told:
            return
        self._forget(name)
        if self._compiling.pop(name, None) is None:
            self._manager.cancel_request(name)

    def _on_embed(self, request: dict[str, Any]) -> None:
        self._embeds[request["id"]] = request | {"inputs": deque(request["inputs"])}

    def _embed_one(self) -> None:
        """One input of the request that came first: generation goes on in between."""
        name, request = next(iter(self._embeds.items()))
        try:
            with self._manager.pause():
                if self._adapters is not None:
                    self._adapters.use(request["adapter"])
                vector = _embedding(self._model, request["inputs"].popleft())
        except Exception as e:  # whatever it is, it is this request's and not the engine's
            del self._embeds[name]
            error = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            self._lines.say("failed", {"id": name, "error": error})
            return
        if not request["inputs"]:
            del self._embeds[name]
        self._lines.say("embedding", {"id": name, "vector": vector})

    def _tell(self) -> None:
        """One line for all tokens since the last one."""
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
                    self._collect(output, tokens, finished)
            queue = self._manager.output_router.output_queue
            output = None if queue.empty() else self._manager.get_result(timeout=0)
        if tokens or finished:
            self._lines.say(
                "step",
                {
                    "tokens": [(name, *told) for name, told in tokens.items()],
                    "finished": finished,
                    "running": len(self._told),
                    "kv_cache_usage": self._kv_cache_usage(),
                },
            )

    def _collect(
        self, output: Any, tokens: dict[str, Any], finished: list[tuple[str, str]]
    ) -> None:
        name, told = output.request_id, self._told[output.request_id]
        if output.is_finished() and (error := self._sampler.error(name)) is not None:
            self._refuse(name, f"its grammar is too complex ({error})")
            return
        new = output.generated_tokens[told:]
        self._told[name] = told + len(new)
        is_ended = output.is_finished()
        logprobs = self._sampler.take_logprobs(name, len(new))
        if is_ended and new and new[-1] in self._eos and not self._sampler.ignores_eos(name):
            finished.append((name, "stop"))
            new, logprobs = new[:-1], None if logprobs is None else logprobs[:-1]
        elif is_ended:
            finished.append((name, "length"))
        if name in tokens:
            before, before_logprobs = tokens[name]
            new = before + new
            logprobs = None if logprobs is None else (before_logprobs or []) + logprobs
        tokens[name] = (new, logprobs)
        if is_ended:
            self._forget(name)

    def _die(self, error: object) -> NoReturn:
        self._lines.say("fatal", f"generation broke down: {error}")
        os._exit(1)

    def _forget(self, name: str) -> None:
        del self._told[name], self._adapter_of[name]
        self._sampler.remove(name)

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


def _load(settings: Settings) -> Any:
    """The model, as the artifact says it is to be loaded; raises ConfigError where it cannot be."""
    import torch

    from compression.targets.packing import load_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(settings.folder)
    try:
        if settings.target is not None:
            target = importlib.import_module(f"compression.targets.{settings.target}")
            return target.load(folder).to(device)
        # A CPU without bfloat16 units is slower in it than in float32.
        return load_folder(folder, "auto" if device == "cuda" else torch.float32).to(device)
    except (OSError, ValueError, KeyError) as e:  # an unknown type, a file that is no such
        rule = f"transformers does not load it: {(str(e).splitlines() or [''])[0]}"
        raise ConfigError("artifact", folder, rule, "export or compress it again") from e


def _adapters(settings: Settings, model: Any) -> Any:
    """`LoraLayers`; None where there are no adapters. Raises ConfigError for one that misfits."""
    if not settings.adapters:
        return None
    from serving.engines.lora import LoraLayers

    adapters = [resolve(name, folder) for name, (folder, _) in settings.adapters.items()]
    for adapter in adapters:
        if adapter.digest != settings.adapters[adapter.name][1]:
            rule, fix = "its files changed since the server looked", "start it again, or swap"
            raise ConfigError(key_of(adapter.name), adapter.folder, rule, fix)
    return LoraLayers(model, adapters)


def _eos_tokens(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.get_text_config().eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _embedding(model: Any, tokens: list[int]) -> list[float]:
    """The mean of the last hidden states, of unit length: (D,)."""
    import torch

    with torch.no_grad():
        inputs = torch.tensor([tokens], device=model.device)
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    mean = hidden[0].float().mean(0)
    vector: list[float] = (mean / mean.norm().clamp_min(1e-12)).tolist()
    return vector


def main(arguments: list[str]) -> None:
    """Entry point."""
    lines = Lines()
    try:
        worker = Worker(Settings(**json.loads(arguments[0])), lines)
    except ConfigError as e:
        lines.say("misconfigured", [e.key, str(e.value), e.rule, e.fix])
        sys.exit(e.exit_code)
    except Exception as e:
        first = (str(e).splitlines() or [""])[0]
        lines.say("fatal", f"{type(e).__name__}: {first}")
        raise
    worker.run()


if __name__ == "__main__":
    main(sys.argv[1:])
