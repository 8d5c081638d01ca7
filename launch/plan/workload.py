"""What a job computes: in tokens, FLOPs and bytes, from the trainer's own configuration."""

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
    """A job, wherever it runs.

    Attributes:
        config: The trainer's.
        shape: Of its model.
        total_steps: Optimizer steps.
        tokens_per_step: Of a global batch.
    """

    config: TrainerConfig
    shape: ModelShape
    total_steps: int
    tokens_per_step: int
    _memory_gib: dict[int, float] = field(default_factory=dict, repr=False, compare=False)
    _refusals: dict[int, str | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def total_tokens(self) -> int:
        """Of the whole job."""
        return self.total_steps * self.tokens_per_step

    @cached_property
    def flops_per_token(self) -> float:
        """Forward and backward."""
        return flops_per_token(
            self.shape.num_parameters_in_matmuls,
            self.shape.num_layers,
            self.shape.hidden_size,
            self.config.data.max_seq_len,
        )

    @property
    def precision(self) -> str:
        """Of matrix products, as `monitoring.throughput.PEAK_FLOPS` names it."""
        return "bf16" if self.config.precision.param_dtype is Dtype.bfloat16 else "fp32"

    @property
    def checkpoint_gb(self) -> float:
        """Of one checkpoint: float32 weights and two moments."""
        return 12 * self.shape.num_parameters / 1e9

    @property
    def export_gb(self) -> float:
        """Of the Hugging Face folder."""
        if not self.config.export.at_end:
            return 0.0
        width = 2 if self.config.export.dtype is Dtype.bfloat16 else 4
        return width * self.shape.num_parameters / 1e9

    def memory_gib(self, num_gpus: int) -> float:
        """What one of so many GPUs needs."""
        if num_gpus not in self._memory_gib:
            plan = plan_memory(self.config, self.shape, num_gpus)
            self._memory_gib[num_gpus] = plan.total / 2**30
        return self._memory_gib[num_gpus]

    def refusal(self, num_gpus: int) -> str | None:
        """Why the trainer would not run on so many GPUs; None where it would."""
        if num_gpus not in self._refusals:
            self._refusals[num_gpus] = self._refuse(num_gpus)
        return self._refusals[num_gpus]

    def _refuse(self, num_gpus: int) -> str | None:
        batch = self.config.global_batch_size
        if num_gpus > batch:
            return f"{num_gpus} GPUs share a global batch of {batch} samples"
        try:
            self.config.check(num_gpus)
        except ConfigError as e:
            return str(e)
        return None


def workload_of(config: TrainerConfig) -> Workload:
    """The amount of work in a configuration.

    Raises:
        ConfigError: Only the clock would end the run, the model's size is not known, or the trainer
            would refuse it everywhere.
    """
    if config.stop.steps is None and config.stop.tokens is None and config.stop.minutes:
        rule = "the clock alone ends this run, so there is no amount of work to price"
        raise ConfigError(
            "stop.minutes", config.stop.minutes, rule, "set stop.tokens or stop.steps"
        )
    # What holds on no number of ranks; what a strategy asks of it is asked for each number of GPUs.
    replace(config, parallel=FsdpConfig()).check(1)
    assert config.total_steps is not None
    tokens_per_step = config.global_batch_size * config.data.max_seq_len
    return Workload(config, model_shape(config), config.total_steps, tokens_per_step)
