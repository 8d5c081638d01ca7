"""DeepSpeed ZeRO stages 1-3, in the same checkpoint format as the other strategies.

DeepSpeed's own partitioned state never reaches the disk: it is read and written one parameter at a
time through `deepspeed.utils.safe_{get,set}_full_*` (deepspeed/utils/tensor_fragment.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import MissingExtraError
from core.folder import locked
from parallel.canonical_state import created_state
from parallel.config import Dtype, PrecisionConfig, ZeroConfig
from parallel.optimizer_state import OptimizerState, Slot
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
    without_zeros,
)
from parallel.world import World

# Parameter attribute, PARAM_COMM_DTYPE_ATTR_NAME in deepspeed/runtime/torch_autocast.py.
_GATHERED_TYPE = "comm_dtype"
_CHUNK_NUMEL = 64 * 1024 * 1024  # elements of a checkpoint that are held in full at a time


class ZeroStrategy(Strategy):
    """Shards optimizer state (1), gradients (2) and parameters (3) with DeepSpeed."""

    def __init__(self, config: ZeroConfig, world: World, precision: PrecisionConfig) -> None:
        self._deepspeed = _import_deepspeed(world.device)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads only this
        self._config, self._world, self._precision = config, world, precision
        self._engine: Any = None
        self._module: nn.Module
        self._build_optimizer: BuildOptimizer
        self._optimizer_state: OptimizerState
        self._parameters: dict[str, nn.Parameter]
        self._buffers: dict[str, Tensor]  # complete on every rank

    def setup(
        self,
        module: nn.Module,
        materialize: Materialize,
        build_optimizer: BuildOptimizer,
        optimizer_state: OptimizerState,
        keep_zeros: Collection[str] = (),
    ) -> None:
        if self._config.stage == 3:
            # Frozen children first, then the trained model; in each, blocks before the rest, so
            # that no rank ever holds more than one block in full.
            for part in (*frozen_children(module), module):
                for block in sharded_blocks(part.get_submodule("model")):
                    materialize(block)
                    self._partition(block)
                materialize(part)
                self._partition(part)
        else:
            materialize(module)
        model = module.get_submodule("model")
        self._parameters, self._buffers = dict(model.named_parameters()), persistent_buffers(model)
        self._module = module
        self._build_optimizer, self._optimizer_state = build_optimizer, optimizer_state
        self._initialize(unused=[])
        for name in keep_zeros:
            # DeepSpeed reduces, clips and updates in one call, so gradients are masked before that,
            # alike on each rank. The parameter is gathered at that time, even at stage 3.
            parameter = self._parameters[name]
            parameter.register_hook(partial(_without_zeros, parameter))

    def _initialize(self, unused: list[str]) -> None:
        """Creates DeepSpeed's engine, in which unused parameters have no weight decay."""
        optimizer = self._build_optimizer(trainable(self._parameters))
        if unused:  # DeepSpeed updates all parameters, those without a gradient with zeros
            passive = [self._parameters[name] for name in unused]  # same order on all ranks
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p not in set(passive)]
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
            optimizer.add_param_group({"params": passive, "weight_decay": 0.0})
        self._engine, *_ = self._deepspeed.initialize(
            model=self._module,
            optimizer=optimizer,
            config=self._deepspeed_config(),
            dist_init_required=False,
        )
        for frozen in frozen_children(self._module):
            # Without the attribute a parameter is gathered in its own type, not in autocast's.
            for parameter in frozen.parameters():
                vars(parameter).pop(_GATHERED_TYPE, None)
        self._create_state()

    def leave_unused(self, **inputs: Any) -> list[str]:
        used: set[str] = set()
        hooks = [
            parameter.register_hook(partial(_note, used, name))
            for name, parameter in trainable(self._parameters).items()
        ]
        with self.accumulate(last=False):  # adds zeros, like the gradients of a micro-batch
            self.backward(self.forward(**inputs) * 0.0)
        for hook in hooks:
            hook.remove()
        unused = [name for name in trainable(self._parameters) if name not in used]
        if unused:
            # Parameter groups are fixed once the engine exists.
            self._engine.destroy()
            self._initialize(unused)
        return unused

    def forward(self, **inputs: Any) -> Tensor:
        loss: Tensor = self._engine(**inputs)
        return loss

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # Undoes the mean that DeepSpeed takes over ranks.
        self._engine.backward(loss * self._world.world_size, scale_wrt_gas=False)

    def step(self, max_norm: float | None, skip_not_finite: bool = False) -> Tensor:
        # DeepSpeed itself skips an update whose norm is not finite, and waits for the device
        # anyway.
        self._engine.optimizer.clip_grad = max_norm or 0.0  # 0 disables clipping
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._world.device)

    def set_lr(self, lr: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        share: dict[str, Tensor] = {}
        for i, (name, parameter) in enumerate(self._parameters.items()):
            mine = i % self._world.world_size == self._world.rank
            # Gathering is collective; one rank keeps the gathered tensor in host memory.
            if not parameter.requires_grad:
                with self._whole(parameter):
                    if mine:
                        share[name] = parameter.detach().to("cpu", copy=True)
                continue
            full = {name: safe_get_full_fp32_param(parameter)}
            for slot in self._optimizer_state.slots:
                full[slot.entry(name)] = safe_get_full_optimizer_state(parameter, slot.name)
            if mine:
                share |= {n: t.detach().to("cpu", copy=True) for n, t in full.items()}
        for i, (name, buffer) in enumerate(self._buffers.items()):
            if i % self._world.world_size == self._world.rank:
                share[name] = buffer.detach().to("cpu", copy=True)
        return share

    @torch.no_grad()
    def load_state(self, read: ReadTensors, num_updates: int) -> None:
        # All ranks read the same chunks, since setting values is collective at stage 3.
        for names in _chunks({n: _full_shape(p) for n, p in self._parameters.items()}):
            for slot in (None, *self._optimizer_state.slots):
                there = {n: self._parameters[n] for n in names}
                if slot is not None:
                    there = trainable(there)
                key = {n: n if slot is None else slot.entry(n) for n in there}
                dtype = torch.float32 if slot is None else torch_dtype(slot.dtype.value)
                values = {
                    key[n]: torch.empty(_full_shape(p), dtype=dtype) for n, p in there.items()
                }
                read(values)
                for name, parameter in there.items():
                    value = values[key[name]].to(self._world.device)
                    if slot is None:
                        self._set_working_copy(parameter, value)
                    if parameter.requires_grad:
                        self._set_master_copy(parameter, value, slot)
        read(self._buffers)
        for state in self._engine.optimizer.optimizer.state.values():
            state[self._optimizer_state.step].fill_(num_updates)

    def _partition(self, module: nn.Module) -> None:
        """Turns complete parameters into ZeRO-3 parameters, of which each rank keeps a part."""
        self._deepspeed.zero.Init(
            module=module, config_dict_or_path=self._deepspeed_config(), dtype=torch.float32
        )

    def _create_state(self) -> None:
        """Creates the optimizer's state before the first step, so that it can be saved or replaced.

        DeepSpeed creates it in the first step. At stages 1 and 2 it also links state to parameters
        only if the first parameter group has state.
        """
        wrapper = self._engine.optimizer
        if self._config.stage == 3:
            partitions = wrapper.fp32_partitioned_groups_flat
        else:
            partitions = wrapper.single_partition_of_fp32_groups
        for partition in partitions:
            created_state(wrapper.optimizer, partition, self._optimizer_state)
        if self._config.stage != 3:
            wrapper._lazy_init_hp_params_optimizer_state()

    def _set_master_copy(self, parameter: nn.Parameter, value: Tensor, slot: Slot | None) -> None:
        """Sets the tensor that the optimizer works on: the parameter, or one of its slots."""
        from deepspeed import utils

        if self._config.stage == 3:
            # DeepSpeed's setters of complete values ignore that the last rank's part is padded.
            part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            size, num_ranks = part.numel(), self._world.world_size
            padded = nn.functional.pad(value.flatten(), (0, size * num_ranks - value.numel()))
            value = padded.narrow(0, size * self._world.rank, size)
            set_parameter = utils.safe_set_local_fp32_param
            set_state = utils.safe_set_local_optimizer_state
        else:
            set_parameter = utils.safe_set_full_fp32_param
            set_state = utils.safe_set_full_optimizer_state
        if slot is None:
            set_parameter(parameter, value)
        else:
            set_state(parameter, value, slot.name)

    def _set_working_copy(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets the parameter that forward uses."""
        with self._whole(parameter, modifier_rank=0):
            parameter.copy_(value)

    def _whole(
        self, parameter: nn.Parameter, modifier_rank: int | None = None
    ) -> AbstractContextManager[None]:
        """Gathers a parameter; the value that `modifier_rank` leaves is kept by all ranks."""
        if self._config.stage != 3:
            return nullcontext()
        gathered: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=modifier_rank
        )
        return gathered

    def _deepspeed_config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self._config.stage}
        if self._config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self._config.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        return {
            # The loop accumulates; it tells DeepSpeed at which micro-batch to reduce.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # torch's fused AdamW runs on the CPU too, without a compiled extension.
            "zero_force_ds_cpu_optimizer": False,
            # DeepSpeed's own bf16 mode rounds the master weights to bfloat16 before the first step.
            "torch_autocast": {
                "enabled": self._precision.param_dtype is Dtype.bfloat16,
                "dtype": "bfloat16",
            },
            "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[
                self._precision.reduce_dtype.value
            ],
            "steps_per_print": 2**31,  # never: the run has its own log
        }


def _without_zeros(parameter: nn.Parameter, grad: Tensor) -> Tensor:
    return without_zeros(grad.clone(), parameter)  # a hook must not modify its argument


def _note(used: set[str], name: str, _: Tensor) -> None:
    used.add(name)


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return torch.Size(shape)


def _chunks(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Yields groups of names, each with about `_CHUNK_NUMEL` elements in total."""
    names: list[str] = []
    numel = 0
    for name, shape in shapes.items():
        if names and numel + shape.numel() > _CHUNK_NUMEL:
            yield names
            names, numel = [], 0
        names.append(name)
        numel += shape.numel()
    yield names


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it probes for one and warns
    # DeepSpeed uses deprecated names of torch in every step, which a user cannot change.
    warnings.filterwarnings("ignore", r"`?torch\.(distributed|jit)\.", FutureWarning)
    warnings.filterwarnings("ignore", r"`?torch\.(distributed|jit)\.", DeprecationWarning)
    try:
        import deepspeed
    except ImportError as e:
        raise MissingExtraError(
            "parallel",
            "zero",
            f"DeepSpeed is not installed ({e})",
            "pip install 'spotforge[deepspeed]'",
        ) from e
    if device.type == "cpu":
        _build_cpu_extension()
    return deepspeed


def _build_cpu_extension() -> None:
    """Compiles DeepSpeed's shared-memory collectives once for all ranks and runs on this machine.

    torch's own lock file survives a killed build and makes every later start wait for ever. Our
    lock is released by the kernel, so a lock file of torch's that exists while we hold it is stale.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / "spotforge.lock"):
        for stale in root.rglob("deepspeed_shm_comm/lock"):
            stale.unlink()
        ShareMemCommBuilder().load(verbose=False)
