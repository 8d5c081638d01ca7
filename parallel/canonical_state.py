"""Canonical state of a model whose torch optimizer updates the model's own parameters.

It serves DDP and FSDP2: their parameters differ (tensors, DTensors), their optimizers do not.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.optimizer_state import OptimizerState
from parallel.strategy import ReadTensors, torch_dtype, trainable


def canonical_state(
    parameters: dict[str, nn.Parameter], optimizer: Optimizer, described: OptimizerState
) -> dict[str, Tensor]:
    """Returns parameters and their optimizer state by canonical name.

    The state of a parameter that was never updated is zero; a frozen parameter has none.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state[name] = parameter.detach()
        if not parameter.requires_grad:
            continue
        own = created_state(optimizer, parameter, described)
        state |= {slot.entry(name): own[slot.name] for slot in described.slots}
    return state


@torch.no_grad()
def load_canonical_state(
    parameters: dict[str, nn.Parameter],
    optimizer: Optimizer,
    described: OptimizerState,
    read: ReadTensors,
    num_updates: int,
) -> None:
    """Fills parameters and their optimizer state in place from a checkpoint."""
    read(canonical_state(parameters, optimizer, described))
    for parameter in trainable(parameters).values():
        optimizer.state[parameter][described.step].fill_(num_updates)


def created_state(
    optimizer: Optimizer, parameter: Tensor, described: OptimizerState
) -> dict[str, Any]:
    """Returns what the optimizer holds of a parameter; creates it if it was never updated."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:  # torch creates the state in the first step; this is the state that it creates
        fused = optimizer.defaults["fused"]
        # The fused kernel reads the step on the device; the others keep it on the CPU.
        device = parameter.device if fused else torch.device("cpu")
        state[described.step] = torch.zeros((), dtype=torch.float32, device=device)
        for slot in described.slots:
            dtype = torch_dtype(slot.dtype.value)
            state[slot.name] = torch.zeros_like(parameter, dtype=dtype)
    return state
