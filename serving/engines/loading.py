"""Loads an artifact and its adapters into an engine program on transformers."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError
from serving.adapters import key_of, resolve

if TYPE_CHECKING:
    from serving.engines.lora import LoraLayers


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


def load_model(settings: Settings, dtype: str, is_plain: bool) -> tuple[Any, list[str]]:
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


def load_adapters(settings: Settings, model: Any) -> LoraLayers | None:
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


def eos_tokens(model: Any) -> list[int]:
    """Returns the tokens that end a text."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.get_text_config().eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)
