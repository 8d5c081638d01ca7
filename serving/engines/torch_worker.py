"""Base of the engine programs on transformers: listens, and says what subclasses generate.

The programs speak the protocol of `serving/engine.py`.
"""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

from core.errors import ConfigError
from core.process.json_lines import IDLE_S, JsonLines
from serving.engine import TokenRequest
from serving.engines.loading import Settings, eos_tokens, load_adapters, load_model

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from serving.engines.grammars import Grammars


class Unfit(Exception):
    """An engine program cannot run a model that transformers loads."""


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

        from serving.engines.forwards import Scorer, check_causal
        from serving.engines.grammars import Grammars
        from serving.engines.sampler import Sampler
        from trainer.cpu import keep_freed_memory

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        keep_freed_memory()  # otherwise page faults take up to a third of the CPU time
        self._lines = lines
        self._model, self._restored = load_model(settings, settings.dtype, is_plain)
        check_causal(self._model, settings.folder)
        text_config = self._model.config.get_text_config()
        self._eos = eos_tokens(self._model)
        trained = getattr(text_config, "max_position_embeddings", None) or 1 << 20
        self._max_context = min(settings.max_context or trained, trained)
        self._sampler = Sampler(self._eos)
        self._adapters = load_adapters(settings, self._model)
        self._scorer = Scorer(settings, self._model, self._adapters)
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
            embeds: Result of `embeds_text`.
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
        from serving.engines.forwards import embedding

        name, request = next(iter(self._embeds.items()))
        try:
            with self._paused():
                if self._adapters is not None:
                    self._adapters.use(request["adapter"])
                vector = embedding(self._model, request["inputs"].popleft())
        except Exception as e:  # any error concerns this request and not the engine
            del self._embeds[name]
            self._lines.say("failed", {"id": name, "error": _one_line(e)})
            return
        if not request["inputs"]:
            del self._embeds[name]
        self._lines.say("embedding", {"id": name, "vector": vector})

    def _on_score(self, asked: dict[str, Any]) -> None:
        try:
            with self._paused():
                scored = self._scorer.score(asked)
        except Exception as e:  # the gateway treats it as a failed check
            self._lines.say("failed", {"id": asked["id"], "error": _one_line(e)})
        else:
            self._lines.say("scored", {"id": asked["id"]} | scored)

    def _on_proven(self, _: Any) -> None:
        self._scorer.free()


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
