"""Which engine runs an artifact on this host, and why."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from monitoring.errors import ConfigError
from serving.artifact import Artifact, Format
from serving.config import EngineConfig, EngineName
from serving.engine import Engine
from serving.engines.process import ProcessEngine, Watch

_TOKENS_OF_A_SEQUENCE = 512  # what the default KV cache has room for, for all that run
_TRANSFORMERS = {Format.huggingface, Format.torchao, Format.compressed_tensors}


async def build(artifact: Artifact, config: EngineConfig, cache: Path) -> tuple[Engine, str]:
    """An engine that is not started yet, and why it is this one.

    Args:
        artifact: What it is to run.
        config: Settings.
        cache: Folder for what is prepared.

    Raises:
        ConfigError: No engine here can run the artifact, or not the one that was asked for.
    """
    if config.name is EngineName.transformers:
        return _transformers(artifact, config), "it was asked for"
    if config.name is EngineName.vllm:
        raise ConfigError("engine.name", "vllm", "is not there yet", "choose transformers")
    return _transformers(artifact, config), "no other is there yet"


def _transformers(artifact: Artifact, config: EngineConfig) -> Engine:
    if artifact.format not in _TRANSFORMERS:
        rule = f"transformers does not run {artifact.format.value}"
        raise ConfigError("engine.name", "transformers", rule, "leave it out")
    max_context, kv_cache_tokens = kv_cache(artifact.folder, config)
    settings = {
        "folder": str(artifact.folder),
        "target": None if artifact.format is Format.huggingface else artifact.format.value,
        "max_context": max_context,
        "max_running": config.max_running,
        "max_batch_tokens": config.max_batch_tokens,
        "kv_cache_tokens": kv_cache_tokens,
        "num_threads": config.num_threads,
    }
    program = "serving.engines.transformers_worker"
    return ProcessEngine([sys.executable, "-m", program, json.dumps(settings)], watch_of(config))


def watch_of(config: EngineConfig) -> Watch:
    """When an engine counts as hung."""
    return Watch(
        start_timeout_s=config.start_timeout_s,
        silence_s=config.silence_s,
        step_timeout_s=config.step_timeout_s,
        probe_interval_s=config.probe_interval_s,
    )


def kv_cache(folder: Path, config: EngineConfig) -> tuple[int, int]:
    """The context, and the tokens that the KV cache has room for.

    Raises:
        ConfigError: The cache is smaller than one context, or the context larger than the model's.
    """
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described = described.get("text_config") or described
    trained = int(described.get("max_position_embeddings") or 1 << 20)
    max_context = config.max_context or trained
    if max_context > trained:
        rule = f"the model knows {trained} positions"
        raise ConfigError("engine.max_context", max_context, rule, "give less")
    if config.kv_cache_mb is None:
        return max_context, max(max_context, config.max_running * _TOKENS_OF_A_SEQUENCE)
    tokens = config.kv_cache_mb * 10**6 // _bytes_of_a_token(described)
    if tokens < max_context:
        rule = f"has room for {tokens} tokens, which is less than one context ({max_context})"
        fix = f"give more, or engine.max_context={tokens}"
        raise ConfigError("engine.kv_cache_mb", config.kv_cache_mb, rule, fix)
    return max_context, tokens


def _bytes_of_a_token(described: dict[str, Any]) -> int:
    """Keys and values of all layers, in float32: what a CPU keeps them in."""
    heads = int(described["num_attention_heads"])
    head_dim = int(described.get("head_dim") or described["hidden_size"] // heads)
    key_value_heads = int(described.get("num_key_value_heads") or heads)
    return 2 * int(described["num_hidden_layers"]) * key_value_heads * head_dim * 4
