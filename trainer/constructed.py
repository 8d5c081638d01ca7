"""Values that a model's constructor gives and its `_init_weights` does not give again."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel


def constructed_values(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Buffers and vectors of a model as its constructor leaves them, by name, on the CPU.

    A model on the meta device has forgotten them: learned activations (Apertus), biases that are
    tied (RoBERTa), buffers that a parent computes (Falcon H1). Parameters of two or more dimensions
    are left out, and go back to the meta device as soon as they are registered, so that no more
    than one of them is ever held.

    Args:
        model: On any device; only its class and its config are used.
        seed: Of what the constructor draws.
    """

    def without_matrices(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.ndim < 2:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch declares hooks that return nothing, and documents those that return a parameter.
    hook = register_module_parameter_registration_hook(without_matrices)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            built = type(model)(copy.deepcopy(model.config))
    finally:
        hook.remove()
    named = (
        *built.named_parameters(remove_duplicate=False),
        *built.named_buffers(remove_duplicate=False),
    )
    return {name: tensor.detach() for name, tensor in named if not tensor.is_meta}
