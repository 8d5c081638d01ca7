"""Base of the engine programs on transformers: loading, listening, embedding and scoring.

They speak the protocol of `serving/engine.py`. Subclasses generate the tokens.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from core.errors import ConfigError
from core.process.json_lines import IDLE_S, JsonLines
from serving.adapters import key_of, resolve
from serving.engine import TokenRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from serving.engines.grammars import Grammars


_CAUSAL_TOKENS = 8  # length of the text whose last token is changed to test for causality


class Unfit(Exception):
    """An engine program cannot run a model that transformers loads."""


@dataclass(frozen=True)
class Settings:
    """Settings of an engine program on transformers.

    Attributes:
        folder: Folder of the artifact.
        target: Target that `python -m compression` packed it for; None: a plain Hugging Face
            folder.
        max_context: Tokens of prompt and answer together, at most; None: the model's limit.
        max_running: Sequences in a step, at most.
        max_batch_tokens: Tokens in a step, at most; longer prompts are cut into several steps.
        kv_cache_tokens: Size of the KV cache in tokens of all sequences together.
        num_threads: Threads of torch on a CPU; None: torch's own choice.
        dtype: Type that the model is loaded and computed in, by torch's name.
        adapters: Folder and digest of each LoRA adapter, by name.
    """

    folder: str
    target: str | None
    max_context: int | None
    max_running: int
    max_batch_tokens: int
    kv_cache_tokens: int
    num_threads: int | None
    dtype: str = "float32"
    adapters: dict[str, tuple[str, str]] = field(default_factory=dict)


class TorchWorker(ABC):
    """An engine program that runs a model of transformers.

    Args:
        settings: Settings of the program.
        lines: Connection to the gateway.
        is_plain: True: the model is loaded with plain attention, False: with the attention that
            transformers selects.
    """

    def __init__(self, settings: Settings, lines: JsonLines, is_plain: bool) -> None:
        import torch
        import transformers
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        from serving.engines.grammars import Grammars
        from serving.engines.sampler import Sampler
        from trainer.cpu import keep_freed_memory

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        keep_freed_memory()  # otherwise page faults take up to a third of the CPU time
        self._settings, self._lines = settings, lines
        self._model, self._restored = _load(settings, settings.dtype, is_plain)
        _check_causal(self._model, settings.folder)
        self._reference: Any = None  # the model that computes scores during the check
        text_config = self._model.config.get_text_config()
        self._eos = _eos_tokens(self._model)
        trained = getattr(text_config, "max_position_embeddings", None) or 1 << 20
        self._max_context = min(settings.max_context or trained, trained)
        self._sampler = Sampler(self._eos)
        self._adapters = _adapters(settings, self._model)
        self._told: dict[str, int] = {}  # number of tokens that were sent, by request
        self._requests: dict[str, TokenRequest] = {}  # that have not ended
        self._compiling: dict[str, TokenRequest] = {}  # requests whose schema is being compiled
        self._embeds: dict[str, dict[str, Any]] = {}  # requests with their remaining inputs
        self._grammars: Grammars | None = None
        tokenizer = AutoTokenizer.from_pretrained(settings.folder, trust_remote_code=False)
        if self._eos and isinstance(tokenizer, PreTrainedTokenizerFast):
            vocab_size = text_config.vocab_size
            self._grammars = Grammars(tokenizer, vocab_size, self._eos, self._on_grammar)

    # -- What subclasses implement -----------------------------------------------------------

    @abstractmethod
    def _begin(self, request: TokenRequest) -> None:
        """Starts a request that was added to the sampler."""

    @abstractmethod
    def _cancel(self, name: str) -> None:
        """Stops a request that was started."""

    @abstractmethod
    def _advance(self) -> None:
        """Generates for a moment and sends the tokens."""

    @abstractmethod
    def _check(self) -> None:
        """Ends the program if it can no longer generate."""

    @abstractmethod
    def _kv_cache_usage(self) -> float:
        """Returns the share of the KV cache that is in use, 0 to 1."""

    @abstractmethod
    def _paused(self) -> AbstractContextManager[None]:
        """Stops generation within the context, so that the model can be used otherwise."""

    # -- What all programs share -------------------------------------------------------------

    def _say_ready(self, name: str, max_running: int, embeds: bool) -> None:
        """Reports that the engine is ready, with its properties.

        Args:
            name: Name and version of the engine.
            max_running: Sequences that the engine steps at once.
            embeds: Result of `_embeds_text`.
        """
        import torch

        features = ["logprobs_when_sampling", "top_k", "min_p", "repetition_penalty"]
        if embeds:
            features.append("embeddings")
        if self._grammars is not None:
            features.append("json_schema")
        device = self._model.device.type
        info = {
            "engine": name,
            "max_context": self._max_context,
            "max_running": max_running,
            "features": features,
            "built_with": f"torch {torch.__version__} on {device}",
            "restored_buffers": self._restored,
        }
        self._lines.say("ready", info)

    def run(self) -> None:
        """Serves until the gateway has ended, or generation has failed."""
        while True:
            # Requests whose grammar is still being compiled have nothing to generate yet.
            is_generating = len(self._told) > len(self._compiling)
            waits = 0 if is_generating or self._embeds else IDLE_S
            for kind, content in self._lines.heard(waits):
                getattr(self, f"_on_{kind}")(content)
            if self._embeds:
                self._embed_one()
            if is_generating:
                self._advance()
            elif not self._embeds:
                self._lines.say("idle", {"kv_cache_usage": self._kv_cache_usage()})
            self._check()

    def _on_submit(self, fields: dict[str, Any]) -> None:
        request = TokenRequest(**fields)
        self._told[request.id] = 0
        self._requests[request.id] = request
        if request.schema is None:
            self._sampler.add(request, None)
            self._begin(request)
        elif self._grammars is None:
            self._refuse(request.id, "this engine does not support JSON schemas")
        else:
            self._compiling[request.id] = request
            self._grammars.compile(request.id, request.schema)

    def _on_grammar(self, name: str, found: LLMatcher | str) -> None:
        """Passes a result from the grammars' thread to the main thread, which owns the state."""
        self._lines.post("compiled", (name, found))

    def _on_compiled(self, told: tuple[str, LLMatcher | str]) -> None:
        name, found = told
        request = self._compiling.pop(name, None)
        if request is None:
            return  # cancelled in the meantime
        if isinstance(found, str):
            self._refuse(name, found)
        else:
            self._sampler.add(request, found)
            self._begin(request)

    def _refuse(self, name: str, why: str) -> None:
        self._forget(name)
        self._lines.say("refused", {"id": name, "error": why})

    def _on_cancel(self, name: str) -> None:
        self._embeds.pop(name, None)
        if name not in self._told:
            return
        self._forget(name)
        if self._compiling.pop(name, None) is None:
            self._cancel(name)

    def _forget(self, name: str) -> None:
        del self._told[name], self._requests[name]
        self._sampler.remove(name)

    def _die(self, error: object) -> NoReturn:
        self._lines.say("fatal", f"generation failed: {error}")
        os._exit(1)  # at once: the thread that generates may hang

    def _collect(
        self,
        name: str,
        new: list[int],
        is_ended: bool,
        tokens: dict[str, Any],
        finished: list[tuple[str, str]],
    ) -> None:
        """Adds a request's new tokens to a step.

        Args:
            name: Id of the request.
            new: Tokens that were generated since the last call.
            is_ended: True: they are the request's last tokens.
            tokens: Tokens and log-probabilities of the step by request; this call adds to them.
            finished: Requests that ended, with their reasons; this call adds to them.
        """
        # A failed grammar ends its text with a forced EOS, which must not pass for an answer.
        if is_ended and (error := self._sampler.error(name)) is not None:
            self._refuse(name, f"its grammar is too complex ({error})")
            return
        self._told[name] += len(new)
        logprobs = self._sampler.take_logprobs(name, len(new))
        if is_ended and new and new[-1] in self._eos and not self._requests[name].ignore_eos:
            finished.append((name, "stop"))
            new, logprobs = new[:-1], None if logprobs is None else logprobs[:-1]
        elif is_ended:
            finished.append((name, "length"))
        # Several outputs of a request may be waiting: the step has one entry for each request.
        if name in tokens:
            before, before_logprobs = tokens[name]
            new = before + new
            logprobs = None if logprobs is None else (before_logprobs or []) + logprobs
        tokens[name] = (new, logprobs)
        if is_ended:
            self._forget(name)

    def _say_step(self, tokens: dict[str, Any], finished: list[tuple[str, str]]) -> None:
        if tokens or finished:
            step = {
                "tokens": [(name, *told) for name, told in tokens.items()],
                "finished": finished,
                "running": len(self._told),
                "kv_cache_usage": self._kv_cache_usage(),
            }
            self._lines.say("step", step)

    # -- Forwards of the whole model ---------------------------------------------------------

    def _on_embed(self, request: dict[str, Any]) -> None:
        self._embeds[request["id"]] = request | {"inputs": deque(request["inputs"])}

    def _embed_one(self) -> None:
        """Embeds one input of the oldest request; generation goes on between the inputs."""
        name, request = next(iter(self._embeds.items()))
        try:
            with self._paused():
                if self._adapters is not None:
                    self._adapters.use(request["adapter"])
                vector = _embedding(self._model, request["inputs"].popleft())
        except Exception as e:  # any error concerns this request and not the engine
            del self._embeds[name]
            self._lines.say("failed", {"id": name, "error": _one_line(e)})
            return
        if not request["inputs"]:
            del self._embeds[name]
        self._lines.say("embedding", {"id": name, "vector": vector})

    def _embeds_text(self) -> bool:
        """Returns whether the model yields hidden states; tested once, before it is advertised."""
        try:
            vector = _embedding(self._model, [0])
        except Exception:  # after any error, the engine reports that it has no embeddings
            return False
        return all(abs(x) < 2 for x in vector)  # False for NaN

    def _on_score(self, asked: dict[str, Any]) -> None:
        try:
            with self._paused():
                scored = self._score(asked)
        except Exception as e:  # the gateway treats it as a failed check
            self._lines.say("failed", {"id": asked["id"], "error": _one_line(e)})
        else:
            self._lines.say("scored", {"id": asked["id"]} | scored)

    def _score(self, asked: dict[str, Any]) -> dict[str, Any]:
        import torch

        from serving.engines.internals import can_leave_logits_out
        from serving.engines.ties import Choices

        if self._reference is None:
            self._reference = self._reference_model()
        tokens, start = asked["tokens"], asked["start"]
        with torch.no_grad(), self._as_asked(asked["adapter"]) as model, _plain(model):
            ids = torch.tensor([tokens], device=model.device)
            kept = {}
            # Only the scored positions, or a long prompt's logits could exceed the memory.
            if can_leave_logits_out(model):
                kept["logits_to_keep"] = len(tokens) - start + 1
            with Choices(map(tuple, asked["turned"])) as choices:
                logits = model(input_ids=ids, use_cache=False, **kept).logits[0]
            rows = logits[start - len(tokens) - 1 : -1].float().log_softmax(-1)
        scores = [
            [row.max().item(), *row[torch.tensor(of, device=row.device)].tolist()]
            for row, of in zip(rows, asked["of"], strict=True)
        ]
        return {"scores": scores, "ties": choices.ties}

    def _on_proven(self, _: Any) -> None:
        """Frees the memory of the model that computed the scores."""
        self._reference = None

    def _reference_model(self) -> Any:
        """Returns the model that computes scores.

        It has the same weights in float32 if they fit in half of the free memory; otherwise it is
        the served model.
        """
        from serving.engines.internals import can_set_attention

        model = self._model
        is_plain = _is_plain(model) or can_set_attention(model)
        if self._settings.dtype == "float32" and is_plain:
            return model
        if 4 * sum(p.numel() for p in model.parameters()) <= _free_bytes(model) / 2:
            return _load(self._settings, "float32", is_plain=True)[0]
        if is_plain:
            return model
        raise MemoryError("there is no memory for a second model with plain attention")

    @contextlib.contextmanager
    def _as_asked(self, adapter: str | None) -> Iterator[Any]:
        """Yields the model that computes scores, with the adapter that is asked for."""
        if self._adapters is None:
            yield self._reference
        elif adapter is None:
            with self._adapters.alone(None):
                yield self._reference
        elif self._adapters.can_merge(adapter, self._reference):
            with self._adapters.alone(None), self._adapters.merged(adapter, self._reference):
                yield self._reference
        else:  # quantized weights are codes, to which nothing can be added: hooks are used
            with self._adapters.alone(adapter):
                yield self._model


def _load(settings: Settings, dtype: str, is_plain: bool) -> tuple[Any, list[str]]:
    """Loads an artifact; returns the model and the names of buffers that were restored.

    Raises:
        ConfigError: The artifact cannot be loaded.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from compression.targets.packing import load_folder
    from serving.engines.buffers import restore_buffers
    from trainer.attention import plain_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, numbers = Path(settings.folder), getattr(torch, dtype)
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(described) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            rule = f"is not served: {described.model_type} is not a causal language model"
            raise ConfigError("artifact", folder, rule, "serve a causal language model")
        attention = plain_attention(described) if is_plain else None
        if settings.target is None:
            model = load_folder(folder, numbers, attention)
        else:
            target = importlib.import_module(f"compression.targets.{settings.target}")
            model = target.load(folder, numbers, attention)
        restored = restore_buffers(model)
        return model.to(device), restored
    except (OSError, ValueError, KeyError, ImportError) as e:  # unknown types, missing files
        rule = f"transformers does not load it: {(str(e).splitlines() or [''])[0]}"
        raise ConfigError("artifact", folder, rule, "export or compress it again") from e


def _check_causal(model: Any, folder: str) -> None:
    """Raises ConfigError for an encoder, whose tokens attend to those that they should predict.

    The last token of a text is changed: the logits before it must stay the same.
    """
    import torch

    size = model.config.get_text_config().vocab_size
    tokens = [i * (size - 1) // _CAUSAL_TOKENS for i in range(1, _CAUSAL_TOKENS + 1)]
    try:
        with torch.no_grad(), _plain(model):
            one, other = (
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
                for ids in (tokens, [*tokens[:-1], tokens[0]])
            )
    except Exception:  # the check of the scores runs the same forward and reports why it fails
        return
    seen = (one[:-1] - other[:-1]).abs().max() / one.abs().max()
    # Exactly 0 in most models. With experts, other rows share a matrix product, which rounds
    # differently.
    if seen > (1e-5 if one.dtype == torch.float32 else 0.05):
        kind = type(model).__name__
        rule = f"is not served: {kind} is an encoder, which attends to the tokens to predict"
        fix = "serve a decoder (with is_decoder=true in config.json if it was trained as one)"
        raise ConfigError("artifact", folder, rule, fix)


def _adapters(settings: Settings, model: Any) -> Any:
    """Returns the `LoraLayers`; None: there are no adapters.

    Raises:
        ConfigError: An adapter does not fit the model, or its files have changed.
    """
    if not settings.adapters:
        return None
    from serving.engines.lora import LoraLayers

    # Read again in this process, so the digests are compared with those that responses will name.
    adapters = [resolve(name, folder) for name, (folder, _) in settings.adapters.items()]
    for adapter in adapters:
        if adapter.digest != settings.adapters[adapter.name][1]:
            rule, fix = "its files have changed since the start", "restart the server, or swap"
            raise ConfigError(key_of(adapter.name), adapter.folder, rule, fix)
    return LoraLayers(model, adapters)


def _eos_tokens(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.get_text_config().eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


@contextlib.contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Makes a model compute with plain attention within the context, without the paged cache."""
    from serving.engines.internals import attention_of
    from trainer.attention import plain_attention

    if _is_plain(model):
        yield
        return
    before = attention_of(model)
    model.set_attn_implementation(plain_attention(model.config))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _is_plain(model: Any) -> bool:
    from serving.engines.internals import attention_of
    from trainer.attention import plain_attention

    return attention_of(model) == plain_attention(model.config)


def _embedding(model: Any, tokens: list[int]) -> list[float]:
    """Returns the mean of the last hidden states, scaled to unit length, (D,)."""
    import torch

    with torch.no_grad(), _plain(model):
        inputs = torch.tensor([tokens], device=model.device)
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    mean = hidden[0].float().mean(0)
    vector: list[float] = (mean / mean.norm().clamp_min(1e-12)).tolist()
    return vector


def _free_bytes(model: Any) -> int:
    """Returns the free memory in bytes of the device that the model is on."""
    import torch

    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    [available] = [line for line in lines if line.startswith("MemAvailable:")]
    return int(available.split()[1]) * 1024


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def serve(worker: type[TorchWorker], arguments: list[str]) -> None:
    """Runs an engine program.

    Args:
        worker: Subclass, which takes settings and lines.
        arguments: Arguments of the command line: the settings as JSON.
    """
    lines = JsonLines()
    try:
        settings = Settings(**json.loads(arguments[0]))
        running = worker(settings, lines)  # type: ignore[call-arg]
    except ConfigError as e:
        lines.say("misconfigured", [e.key, str(e.value), e.rule, e.fix])
        sys.exit(e.exit_code)
    except Unfit as e:
        lines.say("unfit", str(e))
        sys.exit(1)
    except Exception as e:
        lines.say("fatal", _one_line(e))
        raise
    running.run()
