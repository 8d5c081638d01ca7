"""What the engine programs on transformers share: loading, listening, embedding and scoring.

They speak the lines of `serving/engine.py`. How tokens come about is the business of the leaves.
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

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from serving.engines.grammars import Grammars


_CAUSAL_TOKENS = 8  # of the text whose last one is changed


class Unfit(Exception):
    """This way to generate cannot run the model, though transformers loads it."""


@dataclass(frozen=True)
class Settings:
    """Of such a program.

    Attributes:
        folder: Of the artifact.
        target: What the compression packed it for; None: a plain Hugging Face folder.
        max_context: Tokens of prompt and answer together, at most; None: what the model can.
        max_running: Sequences in a step, at most.
        max_batch_tokens: Tokens in a step, at most: longer prompts are cut into several steps.
        kv_cache_tokens: Room for keys and values, in tokens of all sequences together.
        num_threads: Of torch on a CPU; None: its own choice.
        dtype: That the model is loaded and computed in, as torch calls it.
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
    """An engine program with a model of transformers in it.

    Args:
        settings: Of the program.
        lines: To the gateway.
        is_plain: Whether the model is loaded with plain attention, not of transformers' choice.
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
        keep_freed_memory()  # else some processes spend a third of their CPU time on page faults
        self._settings, self._lines = settings, lines
        self._model, self._restored = _load(settings, settings.dtype, is_plain)
        _check_causal(self._model, settings.folder)
        self._reference: Any = None  # what scores are computed with, while the engine is proven
        text_config = self._model.config.get_text_config()
        self._eos = _eos_tokens(self._model)
        trained = getattr(text_config, "max_position_embeddings", None) or 1 << 20
        self._max_context = min(settings.max_context or trained, trained)
        self._sampler = Sampler(self._eos)
        self._adapters = _adapters(settings, self._model)
        self._told: dict[str, int] = {}  # tokens that were told, by request
        self._adapter_of: dict[str, str | None] = {}  # by request
        self._compiling: dict[str, dict[str, Any]] = {}  # requests whose schema is being compiled
        self._embeds: dict[str, dict[str, Any]] = {}  # requests with what is left of their inputs
        self._grammars: Grammars | None = None
        tokenizer = AutoTokenizer.from_pretrained(settings.folder, trust_remote_code=False)
        if self._eos and isinstance(tokenizer, PreTrainedTokenizerFast):
            vocab_size = text_config.vocab_size
            self._grammars = Grammars(tokenizer, vocab_size, self._eos, self._on_grammar)

    # -- What the leaves do ------------------------------------------------------------------

    @abstractmethod
    def _begin(self, request: dict[str, Any]) -> None:
        """Takes a request that the sampler knows already."""

    @abstractmethod
    def _cancel(self, name: str) -> None:
        """Drops a request."""

    @abstractmethod
    def _advance(self) -> None:
        """Generates for a while, and tells the tokens."""

    @abstractmethod
    def _check(self) -> None:
        """Ends the program where nothing can be generated any more."""

    @abstractmethod
    def _kv_cache_usage(self) -> float:
        """Share of the cache that is in use, 0 to 1."""

    @abstractmethod
    def _paused(self) -> AbstractContextManager[None]:
        """Nothing is generated meanwhile, so that the model is free for something else."""

    # -- What all of them do -----------------------------------------------------------------

    def _say_ready(self, name: str, max_running: int, embeds: bool) -> None:
        """Tells what the engine is and can.

        Args:
            name: Of the engine, with its version.
            max_running: Sequences that it works on at once.
            embeds: What `_embeds_text` says.
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
        """Until the gateway is gone, or generation broke down."""
        while True:
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

    def _on_submit(self, request: dict[str, Any]) -> None:
        self._told[request["id"]] = 0
        self._adapter_of[request["id"]] = request["adapter"]
        if request["schema"] is None:
            self._sampler.add(request, None)
            self._begin(request)
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
        del self._told[name], self._adapter_of[name]
        self._sampler.remove(name)

    def _die(self, error: object) -> NoReturn:
        self._lines.say("fatal", f"generation broke down: {error}")
        os._exit(1)

    def _collect(
        self,
        name: str,
        new: list[int],
        is_ended: bool,
        tokens: dict[str, Any],
        finished: list[tuple[str, str]],
    ) -> None:
        """Puts a request's new tokens among those that are told.

        Args:
            name: Of the request.
            new: Tokens since the last ones.
            is_ended: They are its last.
            tokens: What is told of each request, which grows.
            finished: Requests that ended, and why; it grows, too.
        """
        if is_ended and (error := self._sampler.error(name)) is not None:
            self._refuse(name, f"its grammar is too complex ({error})")
            return
        self._told[name] += len(new)
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
        """One input of the request that came first: generation goes on in between."""
        name, request = next(iter(self._embeds.items()))
        try:
            with self._paused():
                if self._adapters is not None:
                    self._adapters.use(request["adapter"])
                vector = _embedding(self._model, request["inputs"].popleft())
        except Exception as e:  # whatever it is, it is this request's and not the engine's
            del self._embeds[name]
            self._lines.say("failed", {"id": name, "error": _one_line(e)})
            return
        if not request["inputs"]:
            del self._embeds[name]
        self._lines.say("embedding", {"id": name, "vector": vector})

    def _embeds_text(self) -> bool:
        """Whether the model has hidden states to tell: asked once, before anybody relies on it."""
        try:
            vector = _embedding(self._model, [0])
        except Exception:  # whatever it is, clients are told that there are none
            return False
        return all(abs(x) < 2 for x in vector)  # NaN is not

    def _on_score(self, asked: dict[str, Any]) -> None:
        try:
            with self._paused():
                scored = self._score(asked)
        except Exception as e:  # the gateway takes it as a proof that failed
            self._lines.say("failed", {"id": asked["id"], "error": _one_line(e)})
        else:
            self._lines.say("scored", {"id": asked["id"]} | scored)

    def _score(self, asked: dict[str, Any]) -> dict[str, Any]:
        import torch

        from serving.engines.ties import Choices

        if self._reference is None:
            self._reference = self._reference_model()
        tokens, start = asked["tokens"], asked["start"]
        with torch.no_grad(), self._as_asked(asked["adapter"]) as model, _plain(model):
            ids = torch.tensor([tokens], device=model.device)
            kept = {}
            if model._supports_logits_to_keep():
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
        """The memory of what scores were computed with is needed no more."""
        self._reference = None

    def _reference_model(self) -> Any:
        """The same weights in float32 where half of the free memory holds them; else the model."""
        model = self._model
        # Some choose their attention as they are built, and cannot change it.
        is_plain = _is_plain(model) or model._can_set_attn_implementation()
        if self._settings.dtype == "float32" and is_plain:
            return model
        if 4 * sum(p.numel() for p in model.parameters()) <= _free_bytes(model) / 2:
            return _load(self._settings, "float32", is_plain=True)[0]
        if is_plain:
            return model
        raise MemoryError("there is no room for a second model, with plain attention")

    @contextlib.contextmanager
    def _as_asked(self, adapter: str | None) -> Iterator[Any]:
        """The model that scores are computed with, with an adapter where one is asked for."""
        if self._adapters is None:
            yield self._reference
        elif adapter is None:
            with self._adapters.alone(None):
                yield self._reference
        elif self._adapters.can_merge(adapter, self._reference):
            with self._adapters.alone(None), self._adapters.merged(adapter, self._reference):
                yield self._reference
        else:  # matrices of codes, to which nothing can be added
            with self._adapters.alone(adapter):
                yield self._model


def _load(settings: Settings, dtype: str, is_plain: bool) -> tuple[Any, list[str]]:
    """The model, as the artifact says it is to be loaded, and its buffers that were restored.

    Raises:
        ConfigError: It cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from compression.targets.packing import load_folder
    from serving.engines.buffers import restore_buffers
    from trainer.attention import plain_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, numbers = Path(settings.folder), getattr(torch, dtype)
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(described) not in AutoModelForCausalLM._model_mapping.keys():
            rule = f"is not served: transformers completes no text with a {described.model_type}"
            raise ConfigError("artifact", folder, rule, "serve a causal language model")
        attention = plain_attention(described) if is_plain else None
        if settings.target is None:
            model = load_folder(folder, numbers, attention)
        else:
            target = importlib.import_module(f"compression.targets.{settings.target}")
            model = target.load(folder, numbers, attention)
        restored = restore_buffers(model)
        return model.to(device), restored
    except (OSError, ValueError, KeyError, ImportError) as e:  # an unknown type, no such file
        rule = f"transformers does not load it: {(str(e).splitlines() or [''])[0]}"
        raise ConfigError("artifact", folder, rule, "export or compress it again") from e


def _check_causal(model: Any, folder: str) -> None:
    """Raises ConfigError for an encoder, whose tokens see the one that they are to predict."""
    import torch

    size = model.config.get_text_config().vocab_size
    tokens = [i * (size - 1) // _CAUSAL_TOKENS for i in range(1, _CAUSAL_TOKENS + 1)]
    try:
        with torch.no_grad(), _plain(model):
            one, other = (
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
                for ids in (tokens, [*tokens[:-1], tokens[0]])
            )
    except Exception:  # the proof asks the same, and says why it fails
        return
    seen = (one[:-1] - other[:-1]).abs().max() / one.abs().max()
    # None at all, but for experts, whose products are of other rows then.
    if seen > (1e-5 if one.dtype == torch.float32 else 0.05):
        kind = type(model).__name__
        rule = f"is not served: as an encoder, {kind} sees the tokens that it is to predict"
        fix = "serve a decoder (one that was trained as such says is_decoder=true in config.json)"
        raise ConfigError("artifact", folder, rule, fix)


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


@contextlib.contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Has a model compute with plain attention, without a cache of pages."""
    from trainer.attention import plain_attention

    if _is_plain(model):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(plain_attention(model.config))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _is_plain(model: Any) -> bool:
    from trainer.attention import plain_attention

    return bool(model.config._attn_implementation == plain_attention(model.config))


def _embedding(model: Any, tokens: list[int]) -> list[float]:
    """The mean of the last hidden states, of unit length: (D,)."""
    import torch

    with torch.no_grad(), _plain(model):
        inputs = torch.tensor([tokens], device=model.device)
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    mean = hidden[0].float().mean(0)
    vector: list[float] = (mean / mean.norm().clamp_min(1e-12)).tolist()
    return vector


def _free_bytes(model: Any) -> int:
    """Of memory, where the model lies."""
    import torch

    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    [available] = [line for line in lines if line.startswith("MemAvailable:")]
    return int(available.split()[1]) * 1024


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def serve(worker: type[TorchWorker], arguments: list[str]) -> None:
    """Runs a program.

    Args:
        worker: A leaf, which takes settings and lines.
        arguments: Of the command line: the settings, as JSON.
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
