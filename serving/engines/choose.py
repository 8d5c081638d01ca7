"""Which engine runs an artifact on this host, and why."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from compression.targets.openvino_program import PYTHON, WeightFormat
from monitoring.errors import ConfigError, SpotforgeError
from serving.adapters import Adapter
from serving.artifact import Artifact, Format
from serving.config import EngineConfig, EngineName
from serving.engine import Engine
from serving.engines import openvino, vllm
from serving.engines.completions import CompletionsClient, http_client
from serving.engines.process import ProcessEngine, watch_of
from serving.engines.remote import RemoteEngine, connect

_TOKENS_OF_A_SEQUENCE = 512  # what the default KV cache has room for, for all that run
_GPU_BATCH_TOKENS = 2048
_OPENVINO_ITEMSIZE = 2  # its KV cache is in float16
_LEAST_RUNNING = 32  # fewer that run at once are no reason to cut prompts into crumbs
_TRANSFORMERS = {Format.huggingface, Format.torchao, Format.compressed_tensors}
_FORMATS = {
    8: WeightFormat("int8"),
    4: WeightFormat("int4"),
    32: WeightFormat("fp32"),
}


async def build(
    artifact: Artifact, config: EngineConfig, cache: Path, adapters: dict[str, Adapter]
) -> tuple[Engine, str]:
    """An engine that is not started yet, and why it is this one.

    `auto` takes transformers for adapters; vLLM on a host with a GPU where SPOTFORGE_VLLM_PYTHON
    names one; OpenVINO for its own IRs, and for dense weights on a host without a GPU where
    SPOTFORGE_OPENVINO_PYTHON names one; transformers for all else, and where an IR cannot be made.

    Args:
        artifact: What it is to run.
        config: Settings.
        cache: Folder for what is prepared.
        adapters: By name.

    Raises:
        ConfigError: No engine here can run the artifact, or not the one that was asked for.
    """
    if adapters and config.name not in (EngineName.auto, EngineName.transformers):
        rule = f"the {config.name.value} engine has no adapters"
        raise ConfigError("adapters", ", ".join(adapters), rule, "serve an export by transformers")
    if config.name is EngineName.remote:  # the artifact is only read for its texts
        return connect(config, kv_cache(artifact.folder, config, 4)[0]), "it was asked for"
    if config.name is EngineName.vllm:
        return _vllm(artifact, config), "it was asked for"
    if artifact.format is Format.gguf:
        rule, fix = "no engine here runs GGUF", "serve the export, or run it in llama.cpp"
        raise ConfigError("artifact", artifact.name, rule, fix)
    if adapters and artifact.format is Format.openvino:
        rule, fix = "the openvino engine has no adapters", "serve an export by transformers"
        raise ConfigError("adapters", ", ".join(adapters), rule, fix)
    if config.name is EngineName.transformers:
        return _transformers(artifact, config, adapters), "it was asked for"
    if config.name is EngineName.openvino:
        return await _openvino(artifact, config, cache), "it was asked for"
    if adapters:
        return _transformers(artifact, config, adapters), "it alone has adapters"
    if artifact.format is Format.openvino:
        return await _openvino(artifact, config, cache), "the artifact is an IR"
    if vllm.has_gpu() and os.environ.get(vllm.PYTHON) and vllm.why_not(artifact) is None:
        return _vllm(artifact, config), f"this host has a GPU, and {vllm.PYTHON} names a vLLM"
    why = _why_not_openvino(artifact)
    if why is None:
        try:
            return await _openvino(artifact, config, cache), "this host has no GPU"
        except SpotforgeError as e:
            why = f"OpenVINO does not do: {e}"
    return _transformers(artifact, config, adapters), why


def _why_not_openvino(artifact: Artifact) -> str | None:
    """None: it is worth the try."""
    if artifact.format is not Format.huggingface:
        return f"it alone runs {artifact.format.value}"
    if vllm.has_gpu():
        return f"this host has a GPU, and {vllm.PYTHON} names no vLLM, which would be faster"
    if not os.environ.get(PYTHON):
        return f"{PYTHON} names no OpenVINO, which would be faster"
    return None


async def _openvino(artifact: Artifact, config: EngineConfig, cache: Path) -> Engine:
    if artifact.format not in (Format.openvino, Format.huggingface):
        rule = f"OpenVINO does not run {artifact.format.value}"
        raise ConfigError("engine.name", "openvino", rule, "serve the export that it was made from")
    weights = _FORMATS[config.openvino_bits]
    prepare = openvino.prepare  # minutes, the first time
    ir = await asyncio.to_thread(prepare, artifact.folder, artifact.digest, cache, weights)
    max_context, kv_cache_tokens = kv_cache(artifact.folder, config, _OPENVINO_ITEMSIZE)
    token_bytes = _bytes_of_a_token(_described(artifact.folder), _OPENVINO_ITEMSIZE)
    arguments = openvino.command(
        ir,
        max_context=max_context,
        max_running=config.max_running,
        max_batch_tokens=_max_batch_tokens(config, 3),
        kv_cache_bytes=kv_cache_tokens * token_bytes,
        num_threads=config.num_threads,
    )
    return ProcessEngine(arguments, watch_of(config))


def _vllm(artifact: Artifact, config: EngineConfig) -> Engine:
    max_context, _ = kv_cache(artifact.folder, config, _itemsize(artifact))
    command = vllm.command(artifact, config, max_context, _max_batch_tokens(config, 3))

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

    return vllm.VllmEngine(command, client, watch_of(config))


def _transformers(artifact: Artifact, config: EngineConfig, adapters: dict[str, Adapter]) -> Engine:
    if artifact.format not in _TRANSFORMERS:
        rule = f"transformers does not run {artifact.format.value}"
        raise ConfigError("engine.name", "transformers", rule, "leave it out")
    max_context, kv_cache_tokens = kv_cache(artifact.folder, config, _itemsize(artifact))
    settings = {
        "folder": str(artifact.folder),
        "target": None if artifact.format is Format.huggingface else artifact.format.value,
        "max_context": max_context,
        "max_running": config.max_running,
        "max_batch_tokens": _max_batch_tokens(config, 6),  # its smallest step is long already
        "kv_cache_tokens": kv_cache_tokens,
        "num_threads": config.num_threads,
        "adapters": {a.name: (str(a.folder), a.digest) for a in adapters.values()},
    }
    program = "serving.engines.transformers_worker"
    return ProcessEngine([sys.executable, "-m", program, json.dumps(settings)], watch_of(config))


def _max_batch_tokens(config: EngineConfig, times_running: int) -> int:
    """Where nobody says, on a CPU: so many that a step with prompts takes up to three without."""
    if config.max_batch_tokens is not None:
        return config.max_batch_tokens
    if vllm.has_gpu():
        return _GPU_BATCH_TOKENS
    return times_running * max(_LEAST_RUNNING, config.max_running)


def _itemsize(artifact: Artifact) -> int:
    """Bytes of a number in transformers' KV cache: it is of the type that the model computes in."""
    if artifact.format is Format.huggingface and not vllm.has_gpu():
        return 4
    described = _described(artifact.folder)
    dtype = described.get("dtype") or described.get("torch_dtype") or "float32"
    return 4 if dtype == "float32" else 2


def kv_cache(folder: Path, config: EngineConfig, itemsize: int) -> tuple[int, int]:
    """The context, and the tokens that the KV cache has room for.

    Args:
        folder: Of the artifact.
        config: Settings.
        itemsize: Bytes of a number in it.

    Raises:
        ConfigError: The cache is smaller than one context, or the context larger than the model's.
    """
    described = _described(folder)
    trained = int(described.get("max_position_embeddings") or 1 << 20)
    max_context = config.max_context or trained
    if max_context > trained:
        rule = f"the model knows {trained} positions"
        raise ConfigError("engine.max_context", max_context, rule, "give less")
    if config.kv_cache_mb is None:
        tokens = max(max_context, config.max_running * _TOKENS_OF_A_SEQUENCE)
        # GPT-2 calls them otherwise.
        is_told = {"num_attention_heads", "hidden_size", "num_hidden_layers"} <= described.keys()
        needed = tokens * _bytes_of_a_token(described, itemsize) if is_told else 0
        fix = "give less, or set engine.kv_cache_mb"
        _check_room("engine.max_running", config.max_running, needed, fix)
        return max_context, tokens
    _check_room("engine.kv_cache_mb", config.kv_cache_mb, config.kv_cache_mb * 10**6, "give less")
    tokens = config.kv_cache_mb * 10**6 // _bytes_of_a_token(described, itemsize)
    if tokens < max_context:
        rule = f"has room for {tokens} tokens, which is less than one context ({max_context})"
        fix = f"give more, or engine.max_context={tokens}"
        raise ConfigError("engine.kv_cache_mb", config.kv_cache_mb, rule, fix)
    return max_context, tokens


def _check_room(key: str, value: int, needed: int, fix: str) -> None:
    there = _host_bytes()
    if not vllm.has_gpu() and needed > there:
        rule = f"its KV cache takes {needed / 1e9:.4g} GB, and this host has {there / 1e9:.4g}"
        raise ConfigError(key, value, rule, fix)


def _described(folder: Path) -> dict[str, Any]:
    """What `config.json` says of the language model."""
    described: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return described.get("text_config") or described


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes_of_a_token(described: dict[str, Any], itemsize: int) -> int:
    """Keys and values of all layers."""
    heads = int(described["num_attention_heads"])
    head_dim = int(described.get("head_dim") or described["hidden_size"] // heads)
    key_value_heads = int(described.get("num_key_value_heads") or heads)
    return 2 * int(described["num_hidden_layers"]) * key_value_heads * head_dim * itemsize
