"""Selects and starts the engine that runs an artifact on this host."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from compression.served import served_dtype
from compression.targets.openvino_program import PYTHON, WeightFormat
from core.errors import ConfigError, SpotforgeError
from core.process import gpus
from core.process.python import python
from serving.adapters import Adapter
from serving.artifact import Artifact, Format, read_object
from serving.config import EngineConfig, EngineName
from serving.engine import Engine, EngineInfo, Unproven
from serving.engines import openvino, scores, vllm
from serving.engines.completions import CompletionsClient, http_client
from serving.engines.process import ProcessEngine, watch_of
from serving.engines.proof import Proof, Score, cases_of
from serving.engines.remote import RemoteEngine, connect

_log = logging.getLogger("spotforge.serving")

_TOKENS_OF_A_SEQUENCE = 512  # that the default KV cache has room for, in each running sequence
_GPU_BATCH_TOKENS = 2048
_OPENVINO_ITEMSIZE = 2  # OpenVINO's KV cache is in float16
_CONTEXT_WITHOUT_LIMIT = 8192  # if neither the model nor the settings give a limit
_OTHER_NAMES = {  # older models' names for the same keys of config.json
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "d_model"),
}
# Counted at least for the tokens of a step: with few running sequences, prompts would be cut into
# steps too small to be efficient.
_LEAST_RUNNING = 32
_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
_OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16"}  # OpenVINO's names
_TORCH_FORMATS = {Format.huggingface, Format.torchao, Format.compressed_tensors}
_OF_TORCH = {  # the modules of engine programs that run a model of transformers
    EngineName.transformers: "serving.engines.transformers_worker",
    EngineName.plain: "serving.engines.plain_worker",
}
# The engine that `auto` tries next if an engine's scores are wrong or it cannot run the model.
_INSTEAD = {
    EngineName.vllm: EngineName.transformers,
    EngineName.openvino: EngineName.transformers,
    EngineName.transformers: EngineName.plain,
}
_FIX = "leave engine.name out, so that an engine that does is selected if there is one"
_FORMATS = {
    8: WeightFormat("int8"),
    4: WeightFormat("int4"),
    32: WeightFormat("fp32"),
}


class Choice(NamedTuple):
    """A selected engine that is not started yet.

    Attributes:
        engine: The engine.
        name: Name of the engine.
        why: Reason for the selection.
        dtype: Type that the engine computes in; None: unknown.
        score: Plain forward of the same weights; None: the weights are not on this host.
        format: Key of `BOUNDS` for the allowed difference from the plain forward.
    """

    engine: Engine
    name: EngineName
    why: str
    dtype: str | None = None
    score: Score | None = None
    format: str = ""


class Started(NamedTuple):
    """An engine that is up.

    Attributes:
        engine: The engine.
        info: Properties that the engine reports.
        why: Name of the engine, the reason for the selection, and remarks.
    """

    engine: Engine
    info: EngineInfo
    why: str


async def start(
    artifact: Artifact, config: EngineConfig, cache: Path, adapters: dict[str, Adapter]
) -> Started:
    """Starts an engine and checks its scores against a plain forward of the model.

    If `auto` selected an engine whose scores are wrong, transformers is tried next, and then the
    plain engine.

    Args:
        artifact: Artifact that the engine runs.
        config: Settings of the engine.
        cache: Folder for converted models and the results of checks.
        adapters: Adapters that the engine loads, by name.

    Raises:
        ConfigError: No engine here can run the artifact, or the one that was asked for cannot.
        SpotforgeError: The engine does not start; no process of it is left.
    """
    if config.name is not EngineName.remote and "vocab_size" not in _described(artifact.folder):
        rule = "is not served: its config.json has no vocab_size, so it is not a language model"
        raise ConfigError("artifact", artifact.name, rule, "serve a causal language model")
    choice = await build(artifact, config, cache, adapters)
    failed: list[str] = []
    while True:
        prove = _proof(choice, artifact, cache, adapters)
        try:
            info = await _start_one(choice.engine, artifact, prove)
        except Unproven as e:
            said, other = f"{choice.name.value}: {e}", _INSTEAD.get(choice.name)
            if config.name is not EngineName.auto or other is None or not _is_torch(artifact):
                fix = "serve another model" if choice.name is EngineName.plain else _FIX
                rule = f"is not served: {'; '.join([*failed, said])}"
                raise ConfigError("artifact", artifact.name, rule, fix) from e
            _log.warning("%s: another engine is tried, since %s", artifact.name, said)
            failed.append(said)
            asked = dataclasses.replace(config, name=other)
            choice = await build(artifact, asked, cache, adapters)
            continue
        why = f"{choice.name.value}, since {'; '.join(failed) or choice.why}"
        if prove is None:
            why += "; its scores are not checked, since the model is not on this host"
        if info.restored_buffers:
            names = ", ".join(info.restored_buffers)
            why += f"; loading left {names} uninitialized, and they were computed"
        dtype = "an unknown type" if choice.dtype is None else choice.dtype
        _log.info("%s (%s): %s in %s: %s", artifact.name, artifact.version, info.engine, dtype, why)
        return Started(choice.engine, info, why)


async def _start_one(engine: Engine, artifact: Artifact, prove: Proof | None) -> EngineInfo:
    try:
        return await engine.start(prove)
    except BaseException as e:
        await engine.close()
        # These name the key or the engine already; any other error gets the artifact's name.
        if not isinstance(e, SpotforgeError) or isinstance(e, ConfigError | Unproven):
            raise
        why = f"the engine does not start: {e}"
        raise SpotforgeError(f"artifact={artifact.name}: {why}") from e


async def build(
    artifact: Artifact, config: EngineConfig, cache: Path, adapters: dict[str, Adapter]
) -> Choice:
    """Selects an engine for an artifact and builds it, but does not start it.

    `auto` selects transformers for adapters; vLLM on a host with a GPU if SPOTFORGE_VLLM_PYTHON is
    set; OpenVINO for its own IRs, and for dense weights on a host without a GPU if
    SPOTFORGE_OPENVINO_PYTHON is set; transformers otherwise, and if the conversion to an IR fails.

    Args:
        artifact: Artifact that the engine runs.
        config: Settings of the engine.
        cache: Folder for converted models.
        adapters: Adapters that the engine loads, by name.

    Raises:
        ConfigError: No engine here can run the artifact, or the one that was asked for cannot.
    """
    # What was asked for by name comes first, and fails rather than falls back; the order of the
    # rest is that of `auto`.
    if adapters and config.name not in (EngineName.auto, *_OF_TORCH):
        rule = f"the {config.name.value} engine does not support adapters"
        raise ConfigError("adapters", ", ".join(adapters), rule, "serve an export by transformers")
    asked = "it was asked for"
    if config.name is EngineName.remote:  # of the artifact, only the tokenizer is used
        engine = connect(config, kv_cache(artifact.folder, config, 4)[0])
        return Choice(engine, config.name, asked)
    if config.name is EngineName.vllm:
        return _vllm(artifact, config, asked)
    if artifact.format is Format.gguf:
        rule, fix = "no engine here runs GGUF", "serve the export, or run it in llama.cpp"
        raise ConfigError("artifact", artifact.name, rule, fix)
    if adapters and artifact.format is Format.openvino:
        rule, fix = (
            "the openvino engine does not support adapters",
            "serve an export by transformers",
        )
        raise ConfigError("adapters", ", ".join(adapters), rule, fix)
    if config.name in _OF_TORCH:
        return _torch(config.name, artifact, config, adapters, asked)
    if config.name is EngineName.openvino:
        return await _openvino(artifact, config, cache, asked)
    if adapters:
        why = "only transformers runs adapters in batches"
        return _torch(EngineName.transformers, artifact, config, adapters, why)
    if artifact.format is Format.openvino:
        return await _openvino(artifact, config, cache, "the artifact is an IR")
    if gpus.has_gpu() and os.environ.get(vllm.PYTHON) and vllm.why_not(artifact) is None:
        return _vllm(artifact, config, f"this host has a GPU, and {vllm.PYTHON} is set")
    why_not = _why_not_openvino(artifact)
    if why_not is None:
        try:
            return await _openvino(artifact, config, cache, "this host has no GPU")
        except SpotforgeError as e:
            # `auto` goes on with the next engine; the reason is logged and shown by /readyz.
            why_not = f"OpenVINO cannot run it: {e}"
    return _torch(EngineName.transformers, artifact, config, adapters, why_not)


def _proof(
    choice: Choice, artifact: Artifact, cache: Path, adapters: dict[str, Adapter]
) -> Proof | None:
    if choice.score is None or choice.dtype is None:
        return None
    weight_bytes = sum(path.stat().st_size for path in artifact.folder.glob("*.safetensors"))
    cases = cases_of(_described(artifact.folder), weight_bytes, gpus.has_gpu(), adapters)
    # Adapters are checked with the artifact, since they change what the engine computes.
    digests = [artifact.digest, *(f"{a.name} {a.digest}" for a in adapters.values())]
    return Proof(cache, digests, cases, choice.format, choice.dtype, choice.score)


def _is_torch(artifact: Artifact) -> bool:
    return artifact.format in _TORCH_FORMATS


def _why_not_openvino(artifact: Artifact) -> str | None:
    """Returns why `auto` does not try OpenVINO; None: it does."""
    if artifact.format is not Format.huggingface:
        return f"only transformers runs {artifact.format.value}"
    if gpus.has_gpu():
        return f"this host has a GPU, and {vllm.PYTHON} is not set (vLLM would be faster)"
    if not os.environ.get(PYTHON):
        return f"{PYTHON} is not set (OpenVINO would be faster)"
    return None


async def _openvino(artifact: Artifact, config: EngineConfig, cache: Path, why: str) -> Choice:
    if artifact.format not in (Format.openvino, Format.huggingface):
        rule = f"OpenVINO does not run {artifact.format.value}"
        raise ConfigError("engine.name", "openvino", rule, "serve the export that it was made from")
    dtype = _dtype(artifact, config)
    if dtype not in _OPENVINO_TYPES:
        rule = f"OpenVINO computes in {' or '.join(_OPENVINO_TYPES)} on a CPU"
        raise ConfigError("engine.dtype", dtype, rule, "choose one of them")
    weights = _FORMATS[config.openvino_bits]
    prepare = openvino.prepare  # takes minutes the first time
    ir = await asyncio.to_thread(prepare, artifact.folder, artifact.digest, cache, weights)
    max_context, kv_cache_tokens = kv_cache(artifact.folder, config, _OPENVINO_ITEMSIZE)
    token_bytes = _bytes_of_a_token(_described(artifact.folder), _OPENVINO_ITEMSIZE)
    if token_bytes is None:
        rule = "the model's config.json lacks what the size of its KV cache is computed from"
        raise ConfigError("engine.name", "openvino", rule, "leave it out")
    arguments = openvino.command(
        ir,
        max_context=max_context,
        max_running=config.max_running,
        max_batch_tokens=_max_batch_tokens(config, 3),
        kv_cache_bytes=kv_cache_tokens * token_bytes,
        num_threads=config.num_threads,
        inference_precision=_OPENVINO_TYPES[dtype],
    )
    # `openvino_bits` says nothing about an IR that was made elsewhere: its weights may have fewer
    # bits, so it gets the wider bound.
    is_whole = artifact.format is Format.huggingface and config.openvino_bits == 32
    format = ("bfloat16" if dtype == "bfloat16" else "float16") if is_whole else "int8"
    engine = ProcessEngine(arguments, watch_of(config))
    return Choice(engine, EngineName.openvino, why, dtype, scores.of_ir(ir), format)


def _vllm(artifact: Artifact, config: EngineConfig, why: str) -> Choice:
    dtype = _dtype(artifact, config)
    max_context, _ = kv_cache(artifact.folder, config, _ITEMSIZES[dtype])
    command = vllm.command(artifact, config, max_context, _max_batch_tokens(config, 3), dtype)

    def client(unix_socket: str) -> RemoteEngine:
        http = http_client("http://vllm", config.step_timeout_s, unix_socket=unix_socket)
        return RemoteEngine(
            CompletionsClient(http),
            max_context=max_context,
            limits_context=True,
            max_running=config.max_running,
            watch=watch_of(config),
            patience_s=config.start_timeout_s,
        )

    engine = vllm.VllmEngine(command, client, watch_of(config))
    format = dtype if artifact.format is Format.huggingface else "int8"
    program = _torch_program(EngineName.plain, artifact, config, {}, dtype)
    # The plain forward runs on the CPU, since vLLM has reserved the GPU's memory.
    plain = ProcessEngine(program, watch_of(config), {"CUDA_VISIBLE_DEVICES": ""})
    return Choice(engine, EngineName.vllm, why, dtype, scores.of_another(plain), format)


def _torch(
    name: EngineName,
    artifact: Artifact,
    config: EngineConfig,
    adapters: dict[str, Adapter],
    why: str,
) -> Choice:
    if not _is_torch(artifact):
        rule = f"transformers does not run {artifact.format.value}"
        raise ConfigError("engine.name", name.value, rule, "leave it out")
    dtype = _dtype(artifact, config)
    program = _torch_program(name, artifact, config, adapters, dtype)
    engine = ProcessEngine(program, watch_of(config))
    return Choice(engine, name, why, dtype, scores.of_program(engine), dtype)


def _torch_program(
    name: EngineName,
    artifact: Artifact,
    config: EngineConfig,
    adapters: dict[str, Adapter],
    dtype: str,
) -> list[str]:
    max_context, kv_cache_tokens = kv_cache(artifact.folder, config, _ITEMSIZES[dtype])
    settings = {
        "folder": str(artifact.folder),
        "target": None if artifact.format is Format.huggingface else artifact.format.value,
        "max_context": max_context,
        "max_running": config.max_running,
        # Twice as many as for the other engines: a step has a high fixed cost, so that more
        # prompt tokens lengthen it less.
        "max_batch_tokens": _max_batch_tokens(config, 6),
        "kv_cache_tokens": kv_cache_tokens,
        "num_threads": config.num_threads,
        "dtype": dtype,
        "adapters": {a.name: (str(a.folder), a.digest) for a in adapters.values()},
    }
    return python("-m", _OF_TORCH[name], json.dumps(settings))


def _dtype(artifact: Artifact, config: EngineConfig) -> str:
    """Returns the type that the artifact is computed in, whichever engine runs it."""
    described = read_object(artifact.folder / "config.json")
    return served_dtype(described, gpus.has_gpu(), config.dtype.value)


def _max_batch_tokens(config: EngineConfig, times_running: int) -> int:
    """Returns `max_batch_tokens`, or its default.

    The default on a CPU lets a step with prompts take about as long as three steps without.
    """
    if config.max_batch_tokens is not None:
        return config.max_batch_tokens
    if gpus.has_gpu():
        return _GPU_BATCH_TOKENS
    return times_running * max(_LEAST_RUNNING, config.max_running)


def kv_cache(folder: Path, config: EngineConfig, itemsize: int) -> tuple[int, int]:
    """Returns the length of the context, and the tokens that the KV cache has room for.

    Args:
        folder: Folder of the artifact.
        config: Settings of the engine.
        itemsize: Bytes of a number in the cache.

    Raises:
        ConfigError: The cache is smaller than one context, or the context larger than the model's.
    """
    described = _described(folder)
    trained = int(described.get("max_position_embeddings") or 0) or None
    max_context = config.max_context or trained or _CONTEXT_WITHOUT_LIMIT
    if trained is not None and max_context > trained:
        rule = f"the model has only {trained} positions"
        raise ConfigError("engine.max_context", max_context, rule, "give less")
    if config.kv_cache_mb is None:
        tokens = max(max_context, config.max_running * _TOKENS_OF_A_SEQUENCE)
        needed = tokens * (_bytes_of_a_token(described, itemsize) or 0)
        fix = "give less, or set engine.kv_cache_mb"
        _check_room("engine.max_running", config.max_running, needed, fix)
        return max_context, tokens
    _check_room("engine.kv_cache_mb", config.kv_cache_mb, config.kv_cache_mb * 10**6, "give less")
    token_bytes = _bytes_of_a_token(described, itemsize)
    if token_bytes is None:
        rule = "the model's config.json lacks what the size of a token is computed from"
        raise ConfigError("engine.kv_cache_mb", config.kv_cache_mb, rule, "leave it out")
    tokens = config.kv_cache_mb * 10**6 // token_bytes
    if tokens < max_context:
        rule = f"has room for {tokens} tokens, fewer than one context ({max_context})"
        fix = f"give more, or engine.max_context={tokens}"
        raise ConfigError("engine.kv_cache_mb", config.kv_cache_mb, rule, fix)
    return max_context, tokens


def _check_room(key: str, value: int, needed: int, fix: str) -> None:
    there = _host_bytes()
    if not gpus.has_gpu() and needed > there:
        rule = f"its KV cache takes {needed / 1e9:.4g} GB, but this host has {there / 1e9:.4g} GB"
        raise ConfigError(key, value, rule, fix)


def _described(folder: Path) -> dict[str, Any]:
    """Returns the language model's part of `config.json`, with older names of keys replaced."""
    told = read_object(folder / "config.json")
    described: dict[str, Any] = told.get("text_config") or told
    renamed = {
        name: described[other]
        for name, other_names in _OTHER_NAMES.items()
        for other in other_names
        if other in described
    }
    return renamed | described


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes_of_a_token(described: dict[str, Any], itemsize: int) -> int | None:
    """Returns the bytes of a token's keys and values in all layers; None: unknown."""
    if not {"num_attention_heads", "hidden_size", "num_hidden_layers"} <= described.keys():
        return None
    heads = int(described["num_attention_heads"])
    head_dim = int(described.get("head_dim") or described["hidden_size"] // heads)
    key_value_heads = int(described.get("num_key_value_heads") or heads)
    return 2 * int(described["num_hidden_layers"]) * key_value_heads * head_dim * itemsize
