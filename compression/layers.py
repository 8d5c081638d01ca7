"""Which matrices of a decoder block methods work on, and which they leave alone."""

from __future__ import annotations

from torch import nn

from compression.experts import SplitExperts, can_split, is_fused


def linear_layers(prefix: str, block: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of a block by full name, each expert's matrices among them.

    Args:
        prefix: The block's name; empty for a whole model.
        block: Loaded, or on the meta device with its experts still fused.
    """
    found = {}
    for local, module in block.named_modules():
        name = f"{prefix}.{local}" if prefix else local
        if isinstance(module, nn.Linear):
            found[name] = module
        elif is_fused(module) and can_split(module):
            found |= linear_layers(name, SplitExperts(module))
    return found


def other_matrices(prefix: str, block: nn.Module, hidden_size: int) -> dict[str, nn.Module]:
    """Modules of a block that multiply by large matrices of their own, yet are no linear layers.

    Convolutions over time, routers and the like are smaller than `hidden_size` squared.

    Args:
        prefix: The block's name.
        block: See `linear_layers`.
        hidden_size: Of the residual stream.
    """
    known = (nn.Linear, nn.Embedding)
    return {
        f"{prefix}.{name}": module
        for name, module in block.named_modules()
        if not isinstance(module, known) and not (is_fused(module) and can_split(module))
        if any(
            parameter.ndim >= 2 and parameter.numel() >= hidden_size**2
            for parameter in module.parameters(recurse=False)
        )
    }
