"""Values that a model's constructor sets and its `_init_weights` does not set again."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel


def constructed_values(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Returns a model's buffers and vectors as its constructor sets them, by name, on the CPU.

    A model on the meta device has lost them: learned activations (Apertus), tied biases (RoBERTa),
    buffers that a parent module computes (Falcon H1). Parameters of two or more dimensions are not
    returned; they are moved to the meta device when they are registered, so that at most one of
    them is in memory at a time.

    Args:
        model: Model on any device; only its class and its config are used.
        seed: Seed of the constructor's random values.
    """

    def without_matrices(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.ndim < 2:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch's type hints lack hooks that return a parameter, which its documentation allows.
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
