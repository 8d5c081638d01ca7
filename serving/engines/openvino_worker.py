"""OpenVINO GenAI's continuous batching as an engine program, in OpenVINO's own environment.

    python -I openvino_worker.py '{"folder": "IR", ...}'

The program speaks the protocol of `serving/engine.py`. `-I` keeps this folder out of `sys.path`,
where our `openvino.py` would hide the library. The only other file of ours that it loads is
`core/process/json_lines.py`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_LINES = Path(__file__).parents[2] / "core/process/json_lines.py"


def _load(path: Path) -> ModuleType:
    """Loads a module from its file, without its package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lines = _load(_LINES)

_BLOCK_TOKENS = 32  # tokens of a block of GenAI's KV cache on a CPU
# Below it sampling is greedy: GenAI divides by the temperature in float32, which overflows to NaN.
_GREEDY_TEMPERATURE = 1e-4
_KV_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "u8": 1}


@dataclass(frozen=True)
class Settings:
    """Settings of the program.

    Attributes:
        folder: Folder of the IR, its configuration and its tokenizer.
        max_context: Tokens of prompt and answer together, at most; None: the model's limit.
        max_running: Sequences in a step, at most.
        max_batch_tokens: Tokens in a step, at most; longer prompts are cut into several steps.
        kv_cache_bytes: Size of the KV cache for all sequences together.
        num_threads: Threads on the CPU; None: all cores.
        properties: Further properties for OpenVINO's CPU plugin.
    """

    folder: str
    max_context: int | None
    max_running: int
    max_batch_tokens: int
    kv_cache_bytes: int
    num_threads: int | None
    properties: dict[str, Any]


@dataclass(frozen=True)
class _Live:
    """A sequence that is being generated."""

    handle: Any
    eos: set[int]
    with_logprobs: bool


class Worker:
    """The engine program: reads the gateway's lines and runs GenAI's steps in one thread."""

    def __init__(self, settings: Settings, told: Any) -> None:
        import openvino_genai as genai

        self._genai, self._lines = genai, told
        folder = Path(settings.folder)
        config = _text_config(_read_json(folder / "config.json"))
        num_blocks = settings.kv_cache_bytes // (
            _BLOCK_TOKENS * _kv_bytes_per_token(folder, settings.properties)
        )
        if num_blocks < 1:
            raise ValueError(f"kv_cache_bytes={settings.kv_cache_bytes} is less than one block")
        self._vocab_size = config["vocab_size"]
        limits = [settings.max_context, config.get("max_position_embeddings")]
        # GenAI drops a sequence half-way if it does not fit the cache.
        self._max_context = min(x for x in [*limits, num_blocks * _BLOCK_TOKENS] if x is not None)
        self._eos = _eos_tokens(folder, config)
        self._max_running = settings.max_running
        # Requests beyond `max_running` wait here: GenAI itself limits only the tokens of a step.
        self._waiting: dict[str, dict[str, Any]] = {}
        self._live: dict[str, _Live] = {}
        self._numbers = itertools.count()
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = num_blocks
        scheduler.max_num_seqs = settings.max_running
        scheduler.max_num_batched_tokens = settings.max_batch_tokens
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = dict(settings.properties)
        if settings.num_threads is not None:
            properties["INFERENCE_NUM_THREADS"] = settings.num_threads
        self._pipeline = genai.ContinuousBatchingPipeline(
            settings.folder, scheduler, "CPU", properties
        )
        features = ["top_k", "repetition_penalty"]
        if hasattr(genai.GenerationConfig(), "min_p"):  # only newer versions have it
            features.append("min_p")
        told.say(
            "ready",
            {
                "engine": f"OpenVINO GenAI {genai.__version__.partition('-')[0]}",
                "max_context": self._max_context,
                "max_running": settings.max_running,
                "max_logprobs": 0,
                "features": features,
            },
        )

    def run(self) -> None:
        """Serves until the gateway has ended."""
        while True:
            is_busy = bool(self._waiting) or self._pipeline.has_non_finished_requests()
            # While busy it only looks: waiting for a line would delay the next step.
            for kind, content in self._lines.heard(0 if is_busy else lines.IDLE_S):
                getattr(self, f"_on_{kind}")(content)
            while self._waiting and len(self._live) < self._max_running:
                self._add(self._waiting.pop(next(iter(self._waiting))))
            if self._pipeline.has_non_finished_requests():
                self._pipeline.step()  # also needed to free cancelled sequences
                self._tell()
            elif not is_busy:
                self._lines.say("idle", {"kv_cache_usage": self._kv_cache_usage()})

    def _on_submit(self, request: dict[str, Any]) -> None:
        try:
            self._check(request)
        except ValueError as e:
            self._fail(request["id"], _one_line(e))
        else:
            self._waiting[request["id"]] = request

    def _add(self, request: dict[str, Any]) -> None:
        import numpy as np
        import openvino

        name = request["id"]
        try:
            prompt = openvino.Tensor(np.array([request["prompt"]], np.int64))
            config = self._generation_config(request)
            handle = self._pipeline.add_request(next(self._numbers), prompt, config)
        except Exception as e:  # any error concerns this request and not the engine
            self._fail(name, _one_line(e))
            return
        eos = set() if request["ignore_eos"] else self._eos
        self._live[name] = _Live(handle, eos, request["logprobs"] is not None)

    def _on_cancel(self, name: str) -> None:
        self._waiting.pop(name, None)
        if (live := self._live.pop(name, None)) is not None:
            live.handle.cancel()

    def _on_embed(self, request: dict[str, Any]) -> None:
        self._fail(request["id"], "OpenVINO GenAI's text generation has no embeddings")

    def _on_proven(self, _: Any) -> None:
        """Does nothing, since another process computed the plain forward of the check."""

    def _check(self, request: dict[str, Any]) -> None:
        """Raises ValueError for a request that this engine does not support."""
        prompt, logprobs = request["prompt"], request["logprobs"]
        if len(prompt) + request["max_tokens"] > self._max_context:
            total = f"{len(prompt)} + {request['max_tokens']} tokens"
            raise ValueError(f"{total} are more than the context of {self._max_context}")
        # GenAI does not check, and reads whatever memory is there.
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise ValueError(f"a token is outside of the vocabulary of {self._vocab_size}")
        # GenAI supports schemas, but one that its compiler refuses breaks the pipeline in the
        # middle of a step, and all sequences in it are lost.
        if request["schema"] is not None:
            raise ValueError("this engine does not support JSON schemas")
        if logprobs:
            raise ValueError("this engine returns no alternatives with log-probabilities")
        # GenAI returns log-probabilities of the distribution that it draws from, so they are the
        # model's own only where no setting changes that distribution.
        cuts = (request["top_p"], request["top_k"], request["min_p"]) != (1, 0, 0)
        is_own = request["temperature"] == 0 or (request["temperature"] == 1 and not cuts)
        if logprobs is not None and not (is_own and request["repetition_penalty"] == 1):
            raise ValueError(
                "this engine returns log-probabilities only at temperature 0, or 1 with top_p 1,"
                " and only without top_k, min_p and repetition_penalty"
            )

    def _generation_config(self, request: dict[str, Any]) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = request["max_tokens"]
        config.ignore_eos = request["ignore_eos"]
        if not request["ignore_eos"]:
            config.stop_token_ids = self._eos
        config.do_sample = request["temperature"] >= _GREEDY_TEMPERATURE
        if config.do_sample:
            config.temperature, config.top_p = request["temperature"], request["top_p"]
            if request["top_k"]:
                config.top_k = request["top_k"]
            if request["min_p"]:
                config.min_p = request["min_p"]
            config.rng_seed = _seed(request["seed"], request["offset"])
        config.repetition_penalty = request["repetition_penalty"]
        config.logprobs = 0 if request["logprobs"] is None else 1
        return config

    def _tell(self) -> None:
        """Sends one line with the tokens of a step."""
        tokens: list[tuple[str, list[int], Any]] = []
        finished: list[tuple[str, str]] = []
        for name, live in list(self._live.items()):
            while name in self._live and live.handle.can_read():
                [output] = live.handle.read().values()
                self._collect(name, live, output, tokens, finished)
            if (
                name in self._live
                and live.handle.get_status() != self._genai.GenerationStatus.RUNNING
            ):
                del self._live[name]
                self._fail(name, f"OpenVINO GenAI ended it: {live.handle.get_status().name}")
        if tokens or finished:
            step = {
                "tokens": tokens,
                "finished": finished,
                "running": len(self._live) + len(self._waiting),
            }
            self._lines.say("step", step | {"kv_cache_usage": self._kv_cache_usage()})

    def _kv_cache_usage(self) -> float:
        return round(float(self._pipeline.get_metrics().cache_usage) / 100, 4)

    def _collect(
        self,
        name: str,
        live: _Live,
        output: Any,
        tokens: list[tuple[str, list[int], Any]],
        finished: list[tuple[str, str]],
    ) -> None:
        new, logprobs = output.generated_ids, output.generated_log_probs
        reason = output.finish_reason
        if reason == self._genai.GenerationFinishReason.STOP:
            finished.append((name, "stop"))
            if new and new[-1] in live.eos:
                new, logprobs = new[:-1], logprobs[:-1]
        elif reason == self._genai.GenerationFinishReason.LENGTH:
            finished.append((name, "length"))
        if reason != self._genai.GenerationFinishReason.NONE:
            del self._live[name]
        told: list[Any] | None
        told = [(logprob, []) for logprob in logprobs] if live.with_logprobs else None
        tokens.append((name, new, told))

    def _fail(self, name: str, error: str) -> None:
        self._lines.say("failed", {"id": name, "error": error})


def _seed(seed: int, offset: int) -> int:
    """Returns the seed of a request's random numbers, from its own seed and its offset.

    GenAI cannot skip the numbers that were drawn before a request was lost, so a continued request
    gets a different stream.
    """
    digest = hashlib.sha256(f"{seed} {offset}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _kv_bytes_per_token(folder: Path, properties: dict[str, Any]) -> int:
    """Returns the bytes of a token's keys and values in all layers.

    They follow from the shapes of the IR's states, (N, H, T, D).
    """
    import openvino

    size = _KV_BYTES[properties["KV_CACHE_PRECISION"]]
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    shapes = [variable.get_info().data_shape for variable in model.get_variables()]
    if not shapes:
        raise ValueError(f"{folder}: the IR has no KV cache; export it again")
    # Integers come with a scale and a zero point in float32, for each token and head.
    side = 8 if size == 1 else 0
    return sum(int(x[1].get_length()) * (int(x[3].get_length()) * size + side) for x in shapes)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = config.get("text_config") or config
    return nested


def _eos_tokens(folder: Path, config: dict[str, Any]) -> set[int]:
    path = folder / "generation_config.json"
    found = _read_json(path).get("eos_token_id") if path.exists() else None
    if found is None:
        found = config.get("eos_token_id")
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:300]


def main(arguments: list[str]) -> None:
    """Runs the program until the gateway has ended."""
    # CI turns OpenVINO's telemetry off. Otherwise a fork that outlives this process reports over
    # the network and keeps our pipes open.
    os.environ["CI"] = "true"
    told = lines.JsonLines()
    code = 2
    try:
        worker = Worker(Settings(**json.loads(arguments[0])), told)
        code = 1
        worker.run()
    except Exception as e:
        told.say("fatal", _one_line(e))
        os._exit(code)  # at once, whatever OpenVINO's threads still do


if __name__ == "__main__":
    main(sys.argv[1:])
