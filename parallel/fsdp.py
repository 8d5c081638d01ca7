"""FSDP2: `torch.distributed.fsdp.fully_shard`, on one mesh axis or two (HSDP)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallel.canonical_state import canonical_state, load_canonical_state
from parallel.config import FsdpConfig, PrecisionConfig
from parallel.optimizer_state import OptimizerState
from parallel.strategy import (
    BuildOptimizer,
    Materialize,
    ReadTensors,
    Strategy,
    frozen_children,
    persistent_buffers,
    sharded_blocks,
    torch_dtype,
    trainable,
    without_gradient,
    without_zeros,
)
from parallel.world import World


class FsdpStrategy(Strategy):
    """Keeps 1 / dp_shard of parameters, gradients and optimizer state on every rank."""

    def __init__(self, config: FsdpConfig, world: World, precision: PrecisionConfig) -> None:
        self._config, self._world, self._precision = config, world, precision
        self._mesh: DeviceMesh
        self._module: FSDPModule
        self._optimizer: Optimizer
        self._optimizer_state: OptimizerState
        self._parameters: dict[str, nn.Parameter]
        self._buffers: dict[str, Tensor]  # complete on every rank
        self._sparse: list[nn.Parameter]  # parameters whose zeros stay zero

    def setup(
        self,
        module: nn.Module,
        materialize: Materialize,
        build_optimizer: BuildOptimizer,
        optimizer_state: OptimizerState,
        keep_zeros: Collection[str] = (),
    ) -> None:
        replicas = self._config.dp_replicate
        shape = (replicas, self._world.world_size // replicas)
        mesh = init_device_mesh(
            self._world.device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard")
        )
        # Without replicas the mesh has one axis: a second of size 1 would add an all-reduce.
        self._mesh = mesh if replicas > 1 else mesh["dp_shard"]
        # Frozen children come before the root, which takes all parameters that are left.
        for frozen in frozen_children(module):
            self._shard(frozen, materialize, True, MixedPrecisionPolicy())
        precision = MixedPrecisionPolicy(
            param_dtype=torch_dtype(self._precision.param_dtype.value),
            reduce_dtype=torch_dtype(self._precision.reduce_dtype.value),
        )
        reshards = self._config.reshard_after_forward
        self._module = self._shard(module, materialize, reshards, precision)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # The loop divides the loss by the global number of tokens, so gradients are summed.
                part.set_gradient_divide_factor(1.0)
                # Otherwise NCCL multiplies before the sum, which other backends do not.
                part.set_force_sum_reduction_for_comms(True)
        model = module.get_submodule("model")
        self._parameters, self._buffers = dict(model.named_parameters()), persistent_buffers(model)
        self._sparse = [self._parameters[name] for name in sorted(keep_zeros)]
        self._optimizer = build_optimizer(trainable(self._parameters))
        self._optimizer_state = optimizer_state

    def _shard(
        self,
        module: nn.Module,
        materialize: Materialize,
        reshards: bool,
        precision: MixedPrecisionPolicy,
    ) -> FSDPModule:
        options: dict[str, Any] = {"mesh": self._mesh, "mp_policy": precision}
        for block in sharded_blocks(module.get_submodule("model")):
            # One complete block at a time: sharding frees most of it before the next is filled.
            materialize(block)
            fully_shard(block, reshard_after_forward=reshards, **options)
        materialize(module)
        # The root's parameters (embedding, head) are needed again as soon as backward begins, so
        # freeing them after forward would only cost another gather.
        return fully_shard(module, reshard_after_forward=False, **options)

    def leave_unused(self, **inputs: Any) -> list[str]:
        with self.accumulate(last=True):
            self.backward(self.forward(**inputs) * 0.0)
        unused = without_gradient(self._parameters)
        self._optimizer.zero_grad()
        self._sparse = [p for p in self._sparse if p not in {self._parameters[n] for n in unused}]
        return unused

    def forward(self, **inputs: Any) -> Tensor:
        assert isinstance(self._module, nn.Module)
        loss: Tensor = self._module(**inputs)
        return loss

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._module.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_norm: float | None, skip_not_finite: bool = False) -> Tensor:
        for parameter in self._sparse:
            assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
            without_zeros(parameter.grad.to_local(), parameter.to_local())
        norm = nn.utils.clip_grad_norm_(
            self._parameters.values(), torch.inf if max_norm is None else max_norm
        )
        if isinstance(norm, DTensor):  # each rank has only the norm of its shards
            norm = norm.full_tensor()
        if not skip_not_finite or torch.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def state(self) -> dict[str, Tensor]:
        rank, world_size = self._world.rank, self._world.world_size
        mine = {n: t for i, (n, t) in enumerate(self._buffers.items()) if i % world_size == rank}
        return canonical_state(self._parameters, self._optimizer, self._optimizer_state) | mine

    def load_state(self, read: ReadTensors, num_updates: int) -> None:
        load_canonical_state(
            self._parameters, self._optimizer, self._optimizer_state, read, num_updates
        )
        read(self._buffers)
