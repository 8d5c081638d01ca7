"""Canonical state of a model whose optimizer is a plain torch AdamW over its own parameters.

It serves DDP and FSDP2: their parameters differ (tensors, DTensors), their optimizers do not.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.strategy import SLOTS, ReadTensors, trainable


def canonical_state(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns parameters and moments by canonical name.

    Moments of a parameter that was never updated are zero; a frozen parameter has no moments.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state[name] = parameter.detach()
        if not parameter.requires_grad:
            continue
        for slot, moment in moments(optimizer, parameter).items():
            state[f"optim.{name}.{slot}"] = moment
    return state


@torch.no_grad()
def load_canonical_state(
    parameters: dict[str, nn.Parameter],
    optimizer: Optimizer,
    read: ReadTensors,
    num_updates: int,
) -> None:
    """Fills parameters and moments in place from a checkpoint."""
    read(canonical_state(parameters, optimizer))
    for parameter in trainable(parameters).values():
        optimizer.state[parameter]["step"].fill_(num_updates)


def moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Returns AdamW's moments of a parameter; creates them as zeros if it was never updated."""
    state = optimizer.state[parameter]
    if not state:  # torch creates the state in the first step; this is the state that it creates
        fused = optimizer.defaults["fused"]
        # The fused kernel reads the step on the device; the others keep it on the CPU.
        device = parameter.device if fused else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for slot in SLOTS:
            state[slot] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {slot: state[slot] for slot in SLOTS}
