"""Asks a model of an engine program for what takes its whole forward: embeddings and scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from core.errors import ConfigError
from serving.engines.internals import attention_of, can_leave_logits_out, can_set_attention
from serving.engines.loading import Settings, load_model
from serving.engines.lora import LoraLayers
from serving.engines.ties import Choices
from trainer.attention import plain_attention

_CAUSAL_TOKENS = 8  # length of the text whose last token is changed to test for causality


class Scorer:
    """Computes log-probabilities by a plain forward of the weights that are served.

    Args:
        settings: Settings of the program.
        model: Model that is served.
        adapters: Adapters of the model; None: there are none.
    """

    def __init__(self, settings: Settings, model: Any, adapters: LoraLayers | None) -> None:
        self._settings, self._model, self._adapters = settings, model, adapters
        self._reference: Any = None  # the model that computes scores during the check

    def score(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Returns the log-probabilities that are asked for, and the ties that were found."""
        if self._reference is None:
            self._reference = self._reference_model()
        tokens, start = asked["tokens"], asked["start"]
        with torch.no_grad(), self._as_asked(asked["adapter"]) as model, plain(model):
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

    def free(self) -> None:
        """Frees the memory of the model that computed the scores."""
        self._reference = None

    def _reference_model(self) -> Any:
        """Returns the model that computes scores.

        It has the same weights in float32 if they fit in half of the free memory; otherwise it is
        the served model.
        """
        model = self._model
        is_plain = _is_plain(model) or can_set_attention(model)
        if self._settings.dtype == "float32" and is_plain:
            return model
        if 4 * sum(p.numel() for p in model.parameters()) <= _free_bytes(model) / 2:
            return load_model(self._settings, "float32", is_plain=True)[0]
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


def embeds_text(model: Any) -> bool:
    """Returns whether the model yields hidden states; tested once, before it is advertised."""
    try:
        vector = embedding(model, [0])
    except Exception:  # after any error, the engine reports that it has no embeddings
        return False
    return all(abs(x) < 2 for x in vector)  # False for NaN


def embedding(model: Any, tokens: list[int]) -> list[float]:
    """Returns the mean of the last hidden states, scaled to unit length, (D,)."""
    with torch.no_grad(), plain(model):
        inputs = torch.tensor([tokens], device=model.device)
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    mean = hidden[0].float().mean(0)
    vector: list[float] = (mean / mean.norm().clamp_min(1e-12)).tolist()
    return vector


def check_causal(model: Any, folder: str) -> None:
    """Raises ConfigError for an encoder, whose tokens attend to those that they should predict.

    The last token of a text is changed: the logits before it must stay the same.
    """
    size = model.config.get_text_config().vocab_size
    tokens = [i * (size - 1) // _CAUSAL_TOKENS for i in range(1, _CAUSAL_TOKENS + 1)]
    try:
        with torch.no_grad(), plain(model):
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


@contextlib.contextmanager
def plain(model: Any) -> Iterator[None]:
    """Makes a model compute with plain attention within the context, without the paged cache."""
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
    return attention_of(model) == plain_attention(model.config)


def _free_bytes(model: Any) -> int:
    """Returns the free memory in bytes of the device that the model is on."""
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    [available] = [line for line in lines if line.startswith("MemAvailable:")]
    return int(available.split()[1]) * 1024
