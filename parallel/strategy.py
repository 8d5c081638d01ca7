"""What the training loop knows about parallelism, and all that it knows.

A strategy is an interface or a leaf: `ddp.py`, `fsdp.py` and `zero.py` are the leaves, and none
overrides anything that another implements. Names and shapes in `state()` are canonical: names of
parameters and persistent buffers as Hugging Face has them, global shapes, moments of what is
trained as `optim.<name>.<slot>`. That is why a checkpoint of one strategy at one world size loads
under any other.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Fills the parameters and buffers of a part of the model, which are on the meta device until then.
Materialize = Callable[[nn.Module], None]
# Takes the model's parameters by canonical name.
BuildOptimizer = Callable[[dict[str, nn.Parameter]], Optimizer]
# Fills the given tensors, by canonical name, from a checkpoint.
ReadTensors = Callable[[dict[str, Tensor]], None]

# AdamW's state of each parameter, as torch and DeepSpeed both name it.
SLOTS = ("exp_avg", "exp_avg_sq")


class Strategy(ABC):
    """Data parallelism of one kind over all ranks.

    The module given to `setup` holds the Hugging Face model as `module.model`, and its forward
    returns the summed loss. Its other children are frozen (a teacher): each holds a model as
    `child.model` in the same way, keeps the type that it has, and has no gradients, no optimizer
    state and no place in `state()`. A strategy that shards parameters shards theirs too.
    """

    @abstractmethod
    def setup(
        self,
        module: nn.Module,
        materialize: Materialize,
        build_optimizer: BuildOptimizer,
        keep_zeros: Collection[str] = (),
    ) -> None:
        """Materializes the model part by part, distributes it, and builds its optimizer.

        Model and optimizer are set up jointly, since FSDP replaces the parameters and DeepSpeed
        fuses both. A strategy that shards never holds more than one part in full.

        Args:
            module: As above.
            materialize: Fills a part.
            build_optimizer: Makes an AdamW.
            keep_zeros: Parameters, by canonical name, of which elements that are zero stay zero:
                gradients go through `without_zeros` before the norm is taken.
        """

    @abstractmethod
    def leave_unused(self, **inputs: Any) -> list[str]:
        """Has updates leave alone what the loss does not depend on, decay included; collective.

        Some models hold parameters that take no part in it: the attention to an encoder that a
        decoder does without, what only chooses among tokens. AdamW passes over them, as they have
        no gradient; DDP would wait for one for ever, and DeepSpeed take zeros for it and decay
        them. Called once after `setup`, before there is state to load; changes no value.

        Args:
            inputs: Those of a forward that is computed for it, and backpropagated to zeros.

        Returns:
            Their names, in the model's order.
        """

    @abstractmethod
    def forward(self, **inputs: Any) -> Tensor:
        """Calls the module in the precision of the run."""

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Encloses forward and backward of one micro-batch; gradients are reduced at the last."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backpropagates. Gradients are *summed* over micro-batches and ranks, never averaged."""

    @abstractmethod
    def step(self, max_norm: float | None, skip_not_finite: bool = False) -> Tensor:
        """Clips the global gradient norm, updates, and zeroes the gradients.

        Args:
            max_norm: Largest norm; None does not clip.
            skip_not_finite: Where the norm is not finite, update nothing; waits for the device.

        Returns:
            The norm before clipping, a scalar on the device (reading it waits for the device).
        """

    @abstractmethod
    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the next update."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """This rank's share of the canonical state: DTensors, or whole tensors it alone writes."""

    @abstractmethod
    def load_state(self, read: ReadTensors, num_updates: int) -> None:
        """Replaces model and optimizer state by that of a checkpoint.

        Args:
            read: Fills tensors from the checkpoint; may be called several times with a few of them,
                so that no rank needs room for all.
            num_updates: Optimizer steps behind that state (AdamW's bias correction).
        """


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that are part of a model's state (a router's bias, a layer's scale), by
    canonical name. Those that a model computes from its configuration are not among them."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def trainable(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Returns the parameters that an optimizer updates; some models hold frozen ones."""
    return {name: p for name, p in parameters.items() if p.requires_grad}


def without_gradient(parameters: dict[str, nn.Parameter]) -> list[str]:
    """Returns names of the trainable parameters that a backward pass has left without one."""
    return [name for name, p in trainable(parameters).items() if p.grad is None]


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that are recomputed or compiled as one; none is within another.

    Hugging Face lists their class names as `_no_split_modules`, as accelerate uses them. It lists
    parts of blocks beside them at times (Mamba's mixer).
    """
    return _outermost(model, lambda module: True)


def sharded_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that can be gathered and freed alone: those of `decoder_blocks`, or within them.

    A parameter that several blocks share (Zamba 2), or that is tied to something outside of its
    block (RoBERTa's embedding), has to be gathered for all of them at once. A block that holds one
    is left out, and what is left out is gathered with the whole model.

    Args:
        model: With its ties: before it is materialized.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def shares_none(module: nn.Module) -> bool:
        own = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        return all(uses[parameter] == count for parameter, count in own.items())

    return _outermost(model, shares_none)


def _outermost(model: nn.Module, accepts: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Modules of the classes in `_no_split_modules` that are accepted and in no other such one."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # parents come first
        if module not in inside and type(module).__name__ in names and accepts(module):
            found.append(module)
            inside.update(module.modules())
    return found


@torch.no_grad()
def without_zeros(grad: Tensor, weight: Tensor) -> Tensor:
    """Zeroes in place the gradient of every element that is zero, and returns it.

    AdamW then leaves it at zero: so are its moments, and what decay takes from it. The weights of
    the moment are all the mask there is. So nothing is stored beside them, a checkpoint holds it,
    and a run that is resumed masks what the run that went on would. One that passes through zero
    by chance has moments, and goes on with them.
    """
    return grad.mul_(weight != 0)  # a gradient that is no number stays none, to be seen


def frozen_children(module: nn.Module) -> list[nn.Module]:
    """What the module given to `setup` holds beside the model that is trained."""
    return [child for name, child in module.named_children() if name != "model"]


def torch_dtype(name: str) -> torch.dtype:
    """`float32` -> `torch.float32`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
