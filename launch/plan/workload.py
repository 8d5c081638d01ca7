"""The workload of a job in tokens, FLOPs and bytes, from the trainer's configuration."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from core.errors import ConfigError
from monitoring.throughput import flops_per_token
from parallel.config import Dtype, FsdpConfig
from trainer.config import TrainerConfig
from trainer.memory import plan_memory
from trainer.shape import ModelShape, model_shape


@dataclass(frozen=True)
class Workload:
    """The work of a job, independent of where it runs.

    Attributes:
        config: Settings of the trainer.
        shape: Shape of the model.
        total_steps: Number of optimizer steps.
        tokens_per_step: Number of tokens in a global batch.
    """

    config: TrainerConfig
    shape: ModelShape
    total_steps: int
    tokens_per_step: int
    _memory_gib: dict[int, float] = field(default_factory=dict, repr=False, compare=False)
    _refusals: dict[int, str | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def total_tokens(self) -> int:
        """Number of tokens that the whole job trains on."""
        return self.total_steps * self.tokens_per_step

    @cached_property
    def flops_per_token(self) -> float:
        """FLOPs for a token, forward and backward."""
        return flops_per_token(
            self.shape.num_parameters_in_matmuls,
            self.shape.num_layers,
            self.shape.hidden_size,
            self.config.data.max_seq_len,
        )

    @property
    def precision(self) -> str:
        """Precision of matrix products, by its name in `monitoring.throughput.PEAK_FLOPS`."""
        return "bf16" if self.config.precision.param_dtype is Dtype.bfloat16 else "fp32"

    @property
    def checkpoint_gb(self) -> float:
        """Size of one checkpoint: float32 weights and the state of the optimizer."""
        return (4 + self.config.optim.state.num_bytes) * self.shape.num_parameters / 1e9

    @property
    def export_gb(self) -> float:
        """Size of the exported Hugging Face folder; 0 without an export."""
        if not self.config.export.at_end:
            return 0.0
        return self.config.export.dtype.num_bytes * self.shape.num_parameters / 1e9

    def memory_gib(self, num_gpus: int) -> float:
        """Returns the memory that each of `num_gpus` GPUs needs."""
        if num_gpus not in self._memory_gib:
            plan = plan_memory(self.config, self.shape, num_gpus)
            self._memory_gib[num_gpus] = plan.total / 2**30
        return self._memory_gib[num_gpus]

    def refusal(self, num_gpus: int) -> str | None:
        """Returns why the trainer would refuse to run on `num_gpus` GPUs; None if it would not."""
        if num_gpus not in self._refusals:
            self._refusals[num_gpus] = self._refuse(num_gpus)
        return self._refusals[num_gpus]

    def _refuse(self, num_gpus: int) -> str | None:
        batch = self.config.global_batch_size
        if num_gpus > batch:
            return f"{num_gpus} GPUs cannot share a global batch of {batch} samples"
        try:
            self.config.check(num_gpus)
        except ConfigError as e:
            return str(e)
        return None


def workload_of(config: TrainerConfig) -> Workload:
    """Returns the workload of a configuration.

    Raises:
        ConfigError: Only a time limit ends the run, the size of the model is unknown, or the
            trainer would refuse the configuration on any number of GPUs.
    """
    if config.stop.steps is None and config.stop.tokens is None and config.stop.minutes:
        rule = "only a time limit ends this run, so the amount of work to price is unknown"
        raise ConfigError(
            "stop.minutes", config.stop.minutes, rule, "set stop.tokens or stop.steps"
        )
    # FSDP on one rank has no demands of its own: this check fails only for what is wrong on any
    # number of GPUs. `Workload.refusal` checks the strategy for each number.
    replace(config, parallel=FsdpConfig()).check(1)
    assert config.total_steps is not None
    tokens_per_step = config.global_batch_size * config.data.max_seq_len
    return Workload(config, model_shape(config), config.total_steps, tokens_per_step)
