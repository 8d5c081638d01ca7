"""Settings of parallelism. Imports neither torch nor DeepSpeed, because `--help` reads it.

`build()` imports the strategy of a config; this is the only place that maps configs to strategies.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from core.errors import ConfigError
from core.settings.rules import setting

if TYPE_CHECKING:
    from parallel.strategy import Strategy
    from parallel.world import World


class Dtype(Enum):
    """Lists floating-point types under torch's names."""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Bytes of an element."""
        return 2 if self is Dtype.bfloat16 else 4


@dataclass
class PrecisionConfig:
    """Selects the types of computation; master weights and optimizer state are always float32.

    Attributes:
        param_dtype: Type of the weights in forward and backward.
        reduce_dtype: Type in which gradients are sent and summed over ranks; bfloat16 halves what a
            slow network carries.
    """

    param_dtype: Dtype = Dtype.float32
    reduce_dtype: Dtype = Dtype.float32


@dataclass
class DdpConfig:
    """Configures DDP: every rank holds the whole model, and gradients are all-reduced.

    Attributes:
        bucket_cap_mb: Size in MiB of the buckets in which gradients are reduced during backward.
    """

    bucket_cap_mb: int = setting(25, above=0, fix="use 25")

    def check(self, world_size: int, precision: PrecisionConfig) -> None:
        """Does nothing: DDP runs with any settings."""

    def build(self, world: World, precision: PrecisionConfig) -> Strategy:
        from parallel.ddp import DdpStrategy

        return DdpStrategy(self, world, precision)


@dataclass
class FsdpConfig:
    """Configures FSDP2, which shards parameters, gradients and optimizer state; or HSDP.

    Attributes:
        dp_replicate: Number of copies of the sharded model.
        dp_shard: Number of ranks that hold one copy; -1 takes world_size / dp_replicate.
        reshard_after_forward: True frees gathered parameters after forward (as ZeRO-3); False keeps
            them until backward is done (as ZeRO-2: faster, more memory).
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    reshard_after_forward: bool = True

    @property
    def ranks_multiple_of(self) -> int:
        """Divisor that the number of ranks must have."""
        return self.dp_replicate * max(1, self.dp_shard)

    def check(self, world_size: int, precision: PrecisionConfig) -> None:
        """Raises ConfigError unless dp_replicate x dp_shard is the world size."""
        if self.dp_replicate < 1 or world_size % self.dp_replicate:
            raise ConfigError(
                "parallel.dp_replicate",
                self.dp_replicate,
                f"must divide the {world_size} ranks",
                f"use a divisor of {world_size}, or start more ranks with nproc=...",
            )
        if self.dp_shard != -1 and self.dp_shard * self.dp_replicate != world_size:
            raise ConfigError(
                "parallel.dp_shard",
                self.dp_shard,
                f"dp_replicate ({self.dp_replicate}) x dp_shard ({self.dp_shard}) must be the "
                f"number of ranks, {world_size}",
                f"use parallel.dp_shard={world_size // self.dp_replicate} or -1, or start "
                f"nproc={max(1, self.dp_replicate * self.dp_shard)} ranks",
            )

    def build(self, world: World, precision: PrecisionConfig) -> Strategy:
        from parallel.fsdp import FsdpStrategy

        return FsdpStrategy(self, world, precision)


@dataclass
class ZeroConfig:
    """Configures DeepSpeed ZeRO, which needs the extra `spotforge[deepspeed]`.

    Attributes:
        stage: Stage of ZeRO: 1 shards optimizer state, 2 also gradients, 3 also parameters.
        offload_optimizer: True keeps optimizer state in host memory.
        offload_parameters: True keeps parameters in host memory between uses (stage 3).
    """

    stage: int = setting(2, choices=(1, 2, 3), fix="use one of ZeRO's stages")
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def check(self, world_size: int, precision: PrecisionConfig) -> None:
        """Raises ConfigError for an option that the stage does not support."""
        if self.offload_parameters and self.stage != 3:
            raise ConfigError(
                "parallel.offload_parameters",
                True,
                f"stage {self.stage} keeps whole parameters on every rank",
                "set parallel.stage=3",
            )

    def build(self, world: World, precision: PrecisionConfig) -> Strategy:
        from parallel.zero import ZeroStrategy

        return ZeroStrategy(self, world, precision)


ParallelConfig = DdpConfig | FsdpConfig | ZeroConfig
