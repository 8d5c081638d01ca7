"""AWQ and SmoothQuant: scale inputs so that weights (or activations) round well.

Dividing an input by `s` where it is made, and multiplying by `s` the weights of the layers that
read it, changes only how both are rounded. A norm makes the input, or the layer before (`up_proj`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression.block import Block, Inputs, output_error, watch_inputs
from compression.experts import SplitExperts
from compression.methods.clipping import clipped_grid
from compression.quantizer import fit_grid
from compression.scheme import Scheme

_TOLERANCE = 1e-3  # largest relative change of a block's output that counts as exact
_RATIOS = tuple(step / 20 for step in range(20))  # exponents that AWQ tries
# If an input is a product of two activations, the factor that is linear can take the scale.
_FACTOR_OF = {"down_proj": "up_proj", "w2": "w3"}


@dataclass(frozen=True)
class Awq:
    """AWQ (Lin et al., arXiv 2306.00978): scales up salient inputs, and clips ranges.

    The scale is `mean(|x|) ** ratio`, with the ratio of the least output error; 0 (plain rounding)
    is among the ratios that are tried.

    Attributes:
        scheme: Scheme of the grid.
    """

    scheme: Scheme
    needs_data = True

    def apply(self, block: Block) -> None:
        """Quantizes the block's layers in place."""
        grams: dict[str, Tensor] = {}
        ratios: dict[str, float] = {}
        for inputs in watch_inputs(block):
            gram, ratio, fold = inputs.gram, 0.0, _fold(block, inputs)
            if fold is not None:
                layers = [block.layers[name] for name in inputs.names]
                ratio, scale = self._best_scale(layers, inputs, block.scale_dtype)
                scale = fold(scale)
                # The layers now receive x / scale: the mean of x x^T follows.
                gram = gram / (scale.unsqueeze(1) * scale)
            grams |= dict.fromkeys(inputs.names, gram)
            ratios |= dict.fromkeys(inputs.names, ratio)
        # Rounded only now: a scale may have gone into a layer that is quantized as well.
        for name, layer in block.layers.items():
            weight = layer.weight.data
            rounded = fit_grid(weight, self.scheme, block.scale_dtype).quantize(weight)
            if name not in grams:  # an expert that no token reached
                block.put(name, rounded, method="rounding")
                continue
            gram = grams[name]
            grid = clipped_grid(weight, gram.diagonal(), self.scheme, block.scale_dtype)
            clipped = grid.quantize(weight)
            errors = [output_error(q.dequantize() - weight, gram) for q in (rounded, clipped)]
            best = clipped if errors[1] < errors[0] else rounded
            method = "awq" if ratios[name] or best is clipped else "rounding"
            block.put(name, best, method=method, ratio=ratios[name], error=min(errors))

    def _best_scale(
        self, layers: list[nn.Linear], inputs: Inputs, dtype: torch.dtype
    ) -> tuple[float, Tensor]:
        least, best = torch.inf, (0.0, torch.ones_like(inputs.mean))
        for ratio in _RATIOS:
            scale = inputs.mean.clamp_min(1e-4) ** ratio
            # Centred on 1, so that the norm that is divided keeps its magnitude.
            scale = scale / (scale.max() * scale.min()).sqrt()
            error = 0.0
            for layer in layers:
                weight = layer.weight.data
                grid = fit_grid(weight * scale, self.scheme, dtype)
                change = grid.quantize(weight * scale).dequantize() / scale - weight
                error += output_error(change, inputs.gram) * len(weight)
            if error < least:
                least, best = error, (ratio, scale)
        return best


@dataclass(frozen=True)
class SmoothQuant:
    """SmoothQuant (Xiao et al., arXiv 2211.10438): moves outliers from activations into weights.

    Attributes:
        scheme: Scheme of the grid, with quantized activations.
        migration: Alpha of the paper; 0 leaves all to the activations, 1 moves all to the weights.
    """

    scheme: Scheme
    migration: float
    needs_data = True

    def apply(self, block: Block) -> None:
        """Quantizes the block's layers in place."""
        for inputs in watch_inputs(block):
            fold = _fold(block, inputs)
            if fold is None:
                continue
            # The largest weight of each input, over all layers that share it: they share the scale
            # too.
            weights = torch.stack(
                [block.layers[name].weight.data.abs().amax(0) for name in inputs.names]
            ).amax(0)
            largest = inputs.largest.clamp_min(1e-5) ** self.migration
            fold(largest / weights.clamp_min(1e-5) ** (1 - self.migration))
        for name, layer in block.layers.items():
            weight = layer.weight.data
            block.put(name, fit_grid(weight, self.scheme, block.scale_dtype).quantize(weight))


# Takes a scale (I) and returns the one that was applied: a norm's weight is stored rounded, so that
# its quotient may differ a little from the wanted one.
Fold = Callable[[Tensor], Tensor]


def _fold(block: Block, inputs: Inputs) -> Fold | None:
    """Returns a function that divides an input by a scale and multiplies its layers by it, or None.

    None means that it cannot be done.

    The maker of the input is found by its output, not by its name. A trial on a batch shows whether
    dividing it there is exact: it is not for a norm that adds one to its weight, or for a factor
    that is used elsewhere as well.
    """
    source, is_known = _source(block, inputs)
    if source is None:
        return None
    layers = [block.layers[name] for name in inputs.names]

    def fold(scale: Tensor) -> Tensor:
        weight = source.weight.data
        if weight.ndim == 1:
            # A norm stays dense: it is divided as the artifact stores it, and the layers are
            # multiplied by what it was really divided by.
            divided = (weight / scale).to(block.dtype).float()
            scale = torch.where(divided == 0, scale, weight / divided)
            source.weight.data = divided
        else:
            source.weight.data = weight / scale.unsqueeze(1)
        if getattr(source, "bias", None) is not None:
            source.bias.data = source.bias.data / scale
        for layer in layers:
            layer.weight.data = layer.weight.data * scale
        return scale

    return fold if is_known or _is_exact(block, fold, len(inputs.mean)) else None


def _source(block: Block, inputs: Inputs) -> tuple[Any, bool]:
    """Returns the module that makes an input, and whether dividing it there is known to be exact.

    That is known for experts only, which the batch of a trial may not reach.
    """
    modules = dict(block.module.named_modules())
    if inputs.feeder is not None:
        source = modules[inputs.feeder]
        weight = getattr(source, "weight", None)
        is_norm = isinstance(weight, Tensor) and weight.shape == inputs.mean.shape
        return (source if is_norm else None), False
    if len(inputs.names) == 1:
        path, _, last = inputs.names[0].removeprefix(f"{block.name}.").rpartition(".")
        factor = modules.get(f"{path}.{_FACTOR_OF.get(last, '')}")
        experts = modules.get(path.rpartition(".")[0])
        if isinstance(factor, nn.Linear) and isinstance(experts, SplitExperts):
            return (factor, True) if experts.scales_through else (None, False)
        if isinstance(factor, nn.Linear):
            return factor, False
    return None, False


@torch.no_grad()
# Compares the block's output before and after a random scale, then puts the weights back.
def _is_exact(block: Block, fold: Fold, num_inputs: int) -> bool:
    batch = next(iter(block.inputs()))
    before = block.run(batch)
    kept = {name: p.data for name, p in block.module.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    fold(torch.rand(num_inputs, generator=generator) + 0.5)
    after = block.run(batch)
    for name, parameter in block.module.named_parameters():
        parameter.data = kept[name]
    return bool((after - before).norm() <= _TOLERANCE * before.norm())
