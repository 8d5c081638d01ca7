"""Many LoRA adapters on one model, each applied to the tokens of its own requests.

Continuous batching concatenates the tokens of all requests of a step to (1, T). Right before the
model is called, it is known which request each token belongs to; a hook on each adapted layer then
adds scale * B A x to the rows of each adapter's requests and leaves the others unchanged. The
base's weights are neither copied nor changed, so any linear layer works, also a quantized one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from core.errors import ConfigError
from serving.adapters import WEIGHTS, Adapter, key_of, tensor_name


class _Update(NamedTuple):
    """Matrices of an adapter for a layer: A transposed, (in, r); B transposed, scaled, (r, out)."""

    down: Tensor
    up: Tensor


class _Share(NamedTuple):
    """Rows of an adapter's requests in a step: in the layers, and in the head.

    None means all rows.
    """

    adapter: str
    rows: Tensor | None
    logits_rows: Tensor | None


class LoraLayers:
    """The adapters of a model.

    Args:
        model: Base model, whose layers get hooks.
        adapters: All adapters that requests may name.

    Raises:
        ConfigError: An adapter does not fit the model.
    """

    def __init__(self, model: Any, adapters: Iterable[Adapter]) -> None:
        self._updates: dict[str, dict[str, _Update]] = {}
        self._shares: list[_Share] = []
        self._is_alone = False
        self._counts: tuple[int, int] | None = None  # rows of a step, in layers and in the head
        modules = dict(model.named_modules())
        self._head, self._device = model.get_output_embeddings(), model.device
        for adapter in adapters:
            _check_fit(adapter, modules)
            self._updates[adapter.name] = _load(adapter, model)
        for layer in {layer for updates in self._updates.values() for layer in updates}:
            modules[layer].register_forward_hook(functools.partial(self._add, layer))

    def __contains__(self, name: object) -> bool:
        return name in self._updates

    def use(self, name: str | None) -> None:
        """Applies an adapter to all rows, until the next step.

        Args:
            name: Name of the adapter; None: the base alone.
        """
        self._shares = [] if name is None else [_Share(name, None, None)]
        self._counts = None

    @contextlib.contextmanager
    def alone(self, name: str | None) -> Iterator[None]:
        """Applies an adapter to all rows of the forwards within the context, which are not steps.

        Args:
            name: Name of the adapter; None: the base alone.
        """
        self.use(name)
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    def can_merge(self, name: str, model: nn.Module) -> bool:
        """Returns whether the weights of a model's adapted layers are plain floating point."""
        weights = (model.get_submodule(layer).weight for layer in self._updates[name])
        return all(type(w) is nn.Parameter and w.is_floating_point() for w in weights)

    @contextlib.contextmanager
    def merged(self, name: str, model: nn.Module) -> Iterator[None]:
        """Replaces W by W + scale * B A within the context, as PEFT would merge an adapter.

        Args:
            name: Name of the adapter.
            model: The base, or a copy of it; the hooks add nothing within the context.
        """
        self.use(None)
        layers: dict[str, Any] = {n: model.get_submodule(n) for n in self._updates[name]}
        # Parameters are replaced and not changed in place: a tied head shares its matrix with the
        # embedding, which the adapter does not change.
        weights = {layer: module.weight for layer, module in layers.items()}
        try:
            for layer, (down, up) in self._updates[name].items():
                module, delta = layers[layer], down @ up  # (in, out)
                delta = delta if isinstance(module, Conv1D) else delta.T
                merged = weights[layer].float() + delta
                module.weight = nn.Parameter(merged.to(weights[layer].dtype), requires_grad=False)
            yield
        finally:
            for layer, module in layers.items():
                module.weight = weights[layer]

    def follow(
        self, model: nn.Module, requests: Callable[[], list[tuple[int, str | None]]]
    ) -> None:
        """Installs a hook that finds, before each step, which request each token belongs to.

        Args:
            model: Model that is called with the tokens of a step, (1, T), and the indices of the
                tokens whose logits are wanted.
            requests: Function that returns the number of tokens and the adapter of each request of
                the coming step, in the order of the tokens.
        """

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            num_tokens, kept = kwargs["input_ids"].shape[1], kwargs.get("logits_to_keep")
            if self._is_alone:
                return
            tokens = range(num_tokens) if kept is None else kept.tolist()
            self._begin(requests(), num_tokens, tokens)

        model.register_forward_pre_hook(before, with_kwargs=True)

    def _begin(
        self, requests: list[tuple[int, str | None]], num_tokens: int, kept: Sequence[int]
    ) -> None:
        owners = [name for count, name in requests for _ in range(count)]
        if len(owners) != num_tokens:
            raise RuntimeError(f"a step has {num_tokens} tokens, its requests {len(owners)}")
        self._counts = num_tokens, len(kept)
        self._shares = []
        for name in {owner for owner in owners if owner is not None}:
            rows = [row for row, owner in enumerate(owners) if owner == name]
            # `kept` is padded with zeros beyond the requests with a new token; those rows may get
            # any adapter, since nothing reads them.
            logits_rows = [row for row, token in enumerate(kept) if owners[token] == name]
            self._shares.append(_Share(name, self._indices(rows), self._indices(logits_rows)))

    def _indices(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self._device)

    def _add(
        self, layer: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Returns a layer's output (..., out) with the adapters' updates added."""
        if not self._shares:
            return output
        x, flat = args[0].flatten(0, -2), output.flatten(0, -2)
        is_head = module is self._head
        # Rows that do not line up with the step would get another request's adapter in silence.
        if self._counts is not None and len(x) != self._counts[is_head]:
            raise RuntimeError(f"{layer} has {len(x)} rows in a step of {self._counts}")
        for share in self._shares:
            update = self._updates[share.adapter].get(layer)
            if update is None:
                continue
            rows = share.logits_rows if is_head else share.rows
            if rows is None:
                flat = flat + _delta(x, update, flat.dtype)
            else:
                flat = flat.index_add(0, rows, _delta(x[rows], update, flat.dtype))
        return flat.view(output.shape)


def _delta(x: Tensor, update: _Update, dtype: torch.dtype) -> Tensor:
    return (x.float() @ update.down @ update.up).to(dtype)


def _check_fit(adapter: Adapter, modules: dict[str, nn.Module]) -> None:
    key, fix = key_of(adapter.name), "serve it on the model that it was trained on"
    for name, layer in adapter.layers.items():
        module = modules.get(name)
        if module is None:
            raise ConfigError(key, adapter.folder, f"the base has no layer {name}", fix)
        if isinstance(module, nn.Linear):
            sizes = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            sizes = (module.nx, module.nf)
        else:
            rule = f"{name} of the base is not a linear layer, but {type(module).__name__}"
            raise ConfigError(key, adapter.folder, rule, fix)
        if sizes != (layer.in_features, layer.out_features):
            ours = f"{layer.in_features} -> {layer.out_features}"
            rule = f"its {name} is {ours}, the base's {sizes[0]} -> {sizes[1]}"
            raise ConfigError(key, adapter.folder, rule, fix)


def _load(adapter: Adapter, model: Any) -> dict[str, _Update]:
    """Returns an adapter's matrices in float32, in which PEFT also computes them."""
    updates = {}
    with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
        for name, layer in adapter.layers.items():
            down = file.get_tensor(tensor_name(name, "A")).float()
            up = file.get_tensor(tensor_name(name, "B")).float() * layer.scale
            if not bool(down.isfinite().all() and up.isfinite().all()):
                rule = f"its matrices of {name} are not finite"
                raise ConfigError(key_of(adapter.name), adapter.folder, rule, "train it again")
            device = model.device
            updates[name] = _Update(down.T.contiguous().to(device), up.T.contiguous().to(device))
    return updates
