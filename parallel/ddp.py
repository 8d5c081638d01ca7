"""Distributed data parallel: `torch.nn.parallel.DistributedDataParallel`."""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from parallel.canonical_state import canonical_state, load_canonical_state
from parallel.config import DdpConfig, Dtype, PrecisionConfig
from parallel.optimizer_state import OptimizerState
from parallel.strategy import (
    BuildOptimizer,
    Materialize,
    ReadTensors,
    Strategy,
    persistent_buffers,
    torch_dtype,
    trainable,
    without_gradient,
    without_zeros,
)
from parallel.world import World

# Buffers (rotary frequencies) are constants, so syncing them is waste. torch renamed the argument
# after 2.11.
_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False
}


class DdpStrategy(Strategy):
    """Keeps the whole model on every rank."""

    def __init__(self, config: DdpConfig, world: World, precision: PrecisionConfig) -> None:
        self._config, self._world, self._precision = config, world, precision
        self._module: nn.Module
        self._optimizer: Optimizer
        self._optimizer_state: OptimizerState
        self._parameters: dict[str, nn.Parameter]
        self._buffers: dict[str, Tensor]
        self._sparse: list[nn.Parameter]  # parameters whose zeros stay zero

    def setup(
        self,
        module: nn.Module,
        materialize: Materialize,
        build_optimizer: BuildOptimizer,
        optimizer_state: OptimizerState,
        keep_zeros: Collection[str] = (),
    ) -> None:
        materialize(module)
        model = module.get_submodule("model")
        self._parameters, self._buffers = dict(model.named_parameters()), persistent_buffers(model)
        self._sparse = [self._parameters[name] for name in sorted(keep_zeros)]
        self._module = self._replicate(module)
        self._optimizer = build_optimizer(trainable(self._parameters))
        self._optimizer_state = optimizer_state

    def _replicate(self, module: nn.Module, has_unused: bool = False) -> nn.Module:
        if self._world.world_size == 1:
            return module
        replicated = DistributedDataParallel(
            module,
            device_ids=[self._world.device] if self._world.device.type == "cuda" else None,
            bucket_cap_mb=self._config.bucket_cap_mb,
            gradient_as_bucket_view=True,
            find_unused_parameters=has_unused,  # costs a walk through the graph at each step
            **_NO_BUFFER_SYNC,
        )
        _order_buckets(replicated)
        if self._precision.reduce_dtype is Dtype.bfloat16:
            replicated.register_comm_hook(None, _mean_in_bfloat16)
        return replicated

    def leave_unused(self, **inputs: Any) -> list[str]:
        # A backward pass times zero shows which parameters get a gradient without changing any.
        # It is not reduced, since DDP would wait for the gradients that never come.
        with self.accumulate(last=False):
            self.backward(self.forward(**inputs) * 0.0)
        unused = without_gradient(self._parameters)
        self._optimizer.zero_grad()
        if unused and isinstance(self._module, DistributedDataParallel):
            # DDP fixes at construction whether it looks for unused parameters.
            self._module = self._replicate(self._module.module, has_unused=True)
        self._sparse = [p for p in self._sparse if p not in {self._parameters[n] for n in unused}]
        return unused

    def forward(self, **inputs: Any) -> Tensor:
        with torch.autocast(
            self._world.device.type,
            dtype=torch_dtype(self._precision.param_dtype.value),
            enabled=self._precision.param_dtype is not Dtype.float32,
        ):
            loss: Tensor = self._module(**inputs)
        return loss

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        reduces = last or not isinstance(self._module, DistributedDataParallel)
        with nullcontext() if reduces else self._module.no_sync():  # type: ignore[operator]
            yield

    def backward(self, loss: Tensor) -> None:
        (loss * self._world.world_size).backward()  # undoes the mean that DDP takes over ranks

    def step(self, max_norm: float | None, skip_not_finite: bool = False) -> Tensor:
        for parameter in self._sparse:
            assert parameter.grad is not None
            without_zeros(parameter.grad, parameter)
        norm = nn.utils.clip_grad_norm_(
            self._parameters.values(), torch.inf if max_norm is None else max_norm
        )
        if not skip_not_finite or torch.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def state(self) -> dict[str, Tensor]:
        whole = (
            canonical_state(self._parameters, self._optimizer, self._optimizer_state)
            | self._buffers
        )
        rank, world_size = self._world.rank, self._world.world_size
        return {n: t for i, (n, t) in enumerate(whole.items()) if i % world_size == rank}

    def load_state(self, read: ReadTensors, num_updates: int) -> None:
        load_canonical_state(
            self._parameters, self._optimizer, self._optimizer_state, read, num_updates
        )
        read(self._buffers)


# torch checks a hook's annotations, which must be types: this file imports no `annotations`.
def _mean_in_bfloat16(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Replaces a bucket's gradients by their means over ranks, sent and summed in bfloat16.

    Gradients stay float32 on each rank. torch's own hook does the same, but refuses to with gloo.
    """
    gradients = bucket.buffer()
    sent = (gradients / dist.get_world_size()).to(torch.bfloat16)
    reduced = dist.all_reduce(sent, async_op=True).get_future()
    means: torch.futures.Future[Tensor] = reduced.then(
        lambda done: gradients.copy_(done.value()[0])
    )
    return means


def _order_buckets(module: DistributedDataParallel) -> None:
    """Makes DDP fix its buckets, by a backward pass through nothing but the parameters.

    DDP rearranges its buckets after its first backward pass, by the order in which gradients came.
    The first step of a resumed run would then sum gradients in another order than the same step of
    an uninterrupted run, and differ in the last bits.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    module.module.forward = lambda: sum(p.sum() for p in parameters) * 0.0
    module().backward()
    del module.module.forward
    for parameter in parameters:
        parameter.grad = None
