"""Finds the matrices of a decoder block that methods change, and those that they cannot change."""

from __future__ import annotations

from torch import nn

from compression.experts import SplitExperts, can_split, is_fused


def linear_layers(prefix: str, block: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers of a block by full name, including each expert's matrices.

    Args:
        prefix: Name of the block; empty for a whole model.
        block: Module, either loaded or on the meta device with its experts still fused.
    """
    found = {}
    for local, module in block.named_modules():
        name = f"{prefix}.{local}" if prefix else local
        if isinstance(module, nn.Linear):
            found[name] = module
        # Fused experts have no linear layers yet: those that a split would make are listed.
        elif is_fused(module) and can_split(module):
            found |= linear_layers(name, SplitExperts(module))
    return found


def other_matrices(prefix: str, block: nn.Module, hidden_size: int) -> dict[str, nn.Module]:
    """Returns modules of a block with large matrices of their own that are not linear layers.

    Modules with fewer than `hidden_size` squared elements, such as routers and short convolutions,
    are not listed.

    Args:
        prefix: Name of the block.
        block: Module, see `linear_layers`.
        hidden_size: Width of the residual stream.
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
