"""The interface between the training loop and parallelism.

`Strategy` is the interface; `ddp.py`, `fsdp.py` and `zero.py` implement it, and no implementation
inherits from another. Names and shapes in `state()` are canonical: parameters and persistent
buffers have the names that Hugging Face gives them, shapes are global, and the state of
optimizers is named as in `optimizer_state.py`. Therefore a checkpoint of one strategy at one world
size loads under any other.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.optimizer_state import OptimizerState

# Fills the parameters and buffers of a part of the model, which are on the meta device before.
Materialize = Callable[[nn.Module], None]
# Makes the optimizer of the model's parameters, given by canonical name.
BuildOptimizer = Callable[[dict[str, nn.Parameter]], Optimizer]
# Fills the given tensors, by canonical name, from a checkpoint.
ReadTensors = Callable[[dict[str, Tensor]], None]


class Strategy(ABC):
    """Trains a model with one kind of data parallelism over all ranks.

    The module given to `setup` holds the Hugging Face model as `module.model`, and its forward
    returns the summed loss. Its other children are frozen, for example a teacher. Each of them
    holds a model as `child.model`, keeps its types, and has no gradients, no optimizer state and no
    entries in `state()`. A strategy that shards parameters shards theirs as well.
    """

    @abstractmethod
    def setup(
        self,
        module: nn.Module,
        materialize: Materialize,
        build_optimizer: BuildOptimizer,
        optimizer_state: OptimizerState,
        keep_zeros: Collection[str] = (),
    ) -> None:
        """Materializes the model part by part, distributes it, and builds its optimizer.

        Model and optimizer are set up together, since FSDP replaces the parameters and DeepSpeed
        combines both. A sharding strategy never holds more than one part of the model in full.

        Args:
            module: Module as described for the class.
            materialize: Function that fills a part of the model.
            build_optimizer: Function that makes the optimizer.
            optimizer_state: Description of its state.
            keep_zeros: Canonical names of parameters whose zero elements stay zero: their gradients
                pass through `without_zeros` before the norm is taken.
        """

    @abstractmethod
    def leave_unused(self, **inputs: Any) -> list[str]:
        """Excludes parameters that the loss does not depend on from updates and decay; collective.

        Some models hold such parameters: the attention to an encoder that a decoder lacks, a router
        that only selects tokens. AdamW skips them, since they have no gradient, but DDP would
        wait for their gradients for ever, and DeepSpeed would assume zeros and decay them. Called
        once after `setup`, before a state is loaded; changes no value.

        Args:
            inputs: Inputs of a forward pass, whose loss is backpropagated times zero.

        Returns:
            Names of the unused parameters, in the model's order.
        """

    @abstractmethod
    def forward(self, **inputs: Any) -> Tensor:
        """Calls the module in the precision of the run."""

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Encloses forward and backward of a micro-batch; gradients are reduced in the last one."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backpropagates; gradients are *summed* over micro-batches and ranks, never averaged."""

    @abstractmethod
    def step(self, max_norm: float | None, skip_not_finite: bool = False) -> Tensor:
        """Clips the global gradient norm, updates the parameters, and zeroes the gradients.

        Args:
            max_norm: Largest norm; None does not clip.
            skip_not_finite: True skips the update if the norm is not finite, which waits for the
                device.

        Returns:
            Norm before clipping, a scalar on the device; reading it waits for the device.
        """

    @abstractmethod
    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the next update."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Returns this rank's share of the canonical state: DTensors, or its own whole tensors."""

    @abstractmethod
    def load_state(self, read: ReadTensors, num_updates: int) -> None:
        """Replaces model and optimizer state by those of a checkpoint.

        Args:
            read: Function that fills tensors from the checkpoint. It may be called several times
                with a few tensors each, so that no rank needs memory for all.
            num_updates: Number of optimizer steps behind that state, for bias correction.
        """


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns by canonical name the buffers that are part of a model's state.

    Examples are a router's bias and a layer's scale. Buffers that a model computes from its
    configuration are not included.
    """
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def trainable(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Returns the parameters that an optimizer updates; some models have frozen ones."""
    return {name: p for name, p in parameters.items() if p.requires_grad}


def without_gradient(parameters: dict[str, nn.Parameter]) -> list[str]:
    """Returns the names of the trainable parameters without a gradient after a backward pass."""
    return [name for name, p in trainable(parameters).items() if p.grad is None]


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks that are recomputed or compiled as a unit; blocks are never nested.

    Hugging Face lists their class names as `_no_split_modules`, which accelerate uses. In some
    models the list also names parts of blocks (Mamba's mixer).
    """
    return _outermost(model, lambda module: True)


def sharded_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks that can be gathered and freed alone: decoder blocks or parts of them.

    A parameter that several blocks share (Zamba 2), or that is tied to a parameter outside its
    block (RoBERTa's embedding), must be gathered for all users at once. A block with such a
    parameter is not returned; its parameters are gathered with the whole model.

    Args:
        model: Model with tied parameters, before it is materialized.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def shares_none(module: nn.Module) -> bool:
        own = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        return all(uses[parameter] == count for parameter, count in own.items())

    return _outermost(model, shares_none)


def _outermost(model: nn.Module, accepts: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Returns the outermost accepted modules of the classes in `_no_split_modules`."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # yields parents before their children
        if module not in inside and type(module).__name__ in names and accepts(module):
            found.append(module)
            inside.update(module.modules())
    return found


@torch.no_grad()
def without_zeros(grad: Tensor, weight: Tensor) -> Tensor:
    """Zeroes in place the gradient of every element whose weight is zero, and returns it.

    AdamW then keeps the weight at zero, because its moments stay zero and decay takes a share of
    zero. The mask is derived from the current weights, so nothing is stored beside them, and a
    resumed run masks the same elements as an uninterrupted run. A weight that passes through zero
    by chance has nonzero moments, and continues with them.
    """
    return grad.mul_(weight != 0)  # NaN times 0 stays NaN, so that the norm check sees it


def frozen_children(module: nn.Module) -> list[nn.Module]:
    """Returns the children of the module given to `setup` other than the trained model."""
    return [child for name, child in module.named_children() if name != "model"]


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch type of a name: `torch.float32` for `float32`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
