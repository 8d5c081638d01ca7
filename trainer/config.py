"""The root of the trainer's settings.

A dataclass of settings is defined beside its consumer, or in the `config.py` of its package if the
consumer imports torch, since composing settings (for `--help`, for the planner) must not. Settings
that select an implementation have a method `build()`. `command.py` registers them with Hydra.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from core.errors import ConfigError
from core.settings.rules import setting
from monitoring.config import MonitoringConfig
from parallel.config import Dtype, PrecisionConfig, ZeroConfig
from trainer.anomaly import AnomalyConfig
from trainer.data.config import expanded
from trainer.interval import Interval
from trainer.model_config import ModelConfig, NamedModelConfig, PathModelConfig
from trainer.optim import AdamWConfig
from trainer.preemption import PreemptionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from parallel.config import ParallelConfig
    from trainer.data.config import DataConfig
    from trainer.objective import Objective
    from trainer.schedule import ScheduleConfig


@dataclass
class PretrainConfig:
    """Configures pretraining: predict the next token of the data."""

    def build(
        self, model: PreTrainedModel, config: ModelConfig, tokenizer_fingerprint: str
    ) -> Objective:
        from trainer.objective import NextTokenLoss

        return NextTokenLoss(model, config.fused_loss is not False)


@dataclass
class DistillConfig:
    """Configures distillation: predict what a larger model, the teacher, predicts.

    Source: Hinton et al., arXiv 1503.02531. The defaults are the divergence alone, without
    cross-entropy, as pruned language models are healed (Minitron, arXiv 2407.14679 and 2408.11796),
    and temperature 1, since models are used with those distributions. FSDP and ZeRO-3 shard the
    teacher; under DDP, ZeRO-1 and ZeRO-2 every rank holds all of it.

    Attributes:
        teacher: Hugging Face folder or hub name of a model with the student's vocabulary.
        revision: Commit, tag or branch of a hub repository.
        temperature: Divisor of the logits of both models.
        weight: Share of the divergence from the teacher in the loss; the rest, to 1, is
            cross-entropy with the data.
        teacher_dtype: Type of the teacher's weights and computation.
    """

    teacher: str = MISSING
    revision: str | None = None
    temperature: float = setting(1.0, above=0, below=math.inf, fix="try 1")
    weight: float = setting(1.0, least=0, most=1, fix="try 1")
    teacher_dtype: Dtype = Dtype.float32

    def __post_init__(self) -> None:
        self.teacher = expanded(self.teacher)

    def build(
        self, model: PreTrainedModel, config: ModelConfig, tokenizer_fingerprint: str
    ) -> Objective:
        from trainer.distillation import DistillationLoss
        from trainer.teacher import build_teacher

        path = PathModelConfig(
            path=self.teacher,
            revision=self.revision,
            attn_implementation=config.attn_implementation,
        )
        teacher = build_teacher(path, self.teacher_dtype, model, tokenizer_fingerprint)
        return DistillationLoss(
            model,
            teacher,
            config.fused_loss is not False,
            temperature=self.temperature,
            weight=self.weight,
        )


def _check_run_name(key: str, name: str) -> None:
    if not name or {"", ".", ".."} & set(name.split("/")):
        rule, fix = "must name a folder under runs/", "use letters, digits, - and _; set run.dir"
        raise ConfigError(key, name or "''", rule, f"{fix} for another place")


@dataclass
class RunConfig:
    """Names the run and its folder.

    Attributes:
        name: Name of the run directory, and of the run in trackers.
        dir: Folder that holds everything a run writes.
    """

    name: str = setting("default", check=_check_run_name)
    dir: str = "runs/${run.name}"


@dataclass
class StopConfig:
    """Configures when training finishes: at the first limit that is reached.

    Attributes:
        steps: Largest number of optimizer steps; null sets no limit. At least one limit must be
            set.
        tokens: Largest number of training tokens; null sets no limit.
        minutes: Longest training time in minutes; null sets no limit.
    """

    steps: int | None = setting(None, above=0)
    tokens: int | None = setting(None, above=0)
    minutes: float | None = setting(None, above=0)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError if no limit is set."""
        if self == StopConfig():
            fix = f"set {key}.steps, {key}.tokens or {key}.minutes"
            raise ConfigError(key, "null", "nothing would end this run", fix)


@dataclass
class LogConfig:
    """Configures how often metrics are written.

    Attributes:
        every_steps: Number of steps between two lines of metrics; each line waits for the device
            once.
    """

    every_steps: int = setting(10, above=0)


@dataclass
class EvaluationConfig:
    """Configures validation and generated samples.

    Attributes:
        every_steps: Number of steps between evaluations; null evaluates at the end only.
        at_start: True also evaluates before the first step, as step 0, unless the run is resumed.
        max_samples: Number of held-out samples of `data.max_seq_len` tokens to use; null uses all.
        sample_prompt: Text to continue at each evaluation; an empty one begins a text, null
            generates nothing.
        sample_tokens: Number of tokens to generate.
        sample_temperature: Temperature of sampling; at 0 the most likely token is taken, which
            makes small models repeat themselves.
    """

    every_steps: int | None = setting(None, above=0)
    at_start: bool = False
    max_samples: int | None = setting(256, above=0)
    sample_prompt: str | None = None
    sample_tokens: int = setting(64, above=0)
    sample_temperature: float = setting(0.7, least=0, fix="0 takes the likeliest token")


def _check_replicas(_: str, text: str) -> None:
    if text != "auto" and not text.isdecimal():
        raise ConfigError("checkpoint.replicas", text, "must be auto or a number", "use auto")


@dataclass
class CheckpointConfig:
    """Configures when checkpoints are saved, how many are kept, and where.

    Attributes:
        interval: Time between saves: `auto` weighs the cost of a save against the loss at a
            preemption, a number is steps, `10min` is time, `end` saves only at the end and on a
            stop.
        mean_hours_between_preemptions: Hours between two preemptions that `auto` assumes until it
            has seen some.
        keep_last: Number of newest committed checkpoints to keep.
        keep_every: Divisor of the steps whose checkpoints are kept for good; null keeps none for
            good.
        asynchronous: True writes in the background; false waits until each checkpoint is on disk.
        replicas: Number of other machines that hold a copy of each machine's files, where machines
            have disks of their own: `auto` is 1 there, and 0 where all share one.
        upload: URL of a folder in an object store (`s3://bucket/run`, any fsspec URL) to which each
            checkpoint is copied in the background; a run on a new machine resumes from there.
    """

    interval: str = setting("auto", check=lambda _, text: Interval.parse(text))
    mean_hours_between_preemptions: float = setting(6.0, above=0, fix="use 6")
    keep_last: int = setting(2, least=1, fix="use 2")
    keep_every: int | None = setting(None, least=1, fix="use 1000, or null")
    asynchronous: bool = True
    replicas: str = setting("auto", check=_check_replicas)
    upload: str | None = None


@dataclass
class FakeQuantConfig:
    """Configures rounding of linear layers' weights in decoder blocks (trainer/fake_quant.py).

    Attributes:
        bits: Bits of a rounded weight; null: nothing is rounded.
        group_size: Number of consecutive inputs that share a scale; null: all of a row.
        scale_dtype: Type in which the quantized model will store scales.
    """

    bits: int | None = setting(None, least=2, most=8, fix="use 4 or 8")
    group_size: int | None = setting(None, above=0, fix="use 64, or null for a scale a row")
    scale_dtype: Dtype = Dtype.bfloat16

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for a group size without bits."""
        if self.bits is None and self.group_size is not None:
            rule = f"has no effect without {key}.bits"
            raise ConfigError(f"{key}.group_size", self.group_size, rule, "set bits, too")


@dataclass
class ExportConfig:
    """Configures the export as a Hugging Face folder.

    Attributes:
        at_end: True writes the folder when the run finishes.
        dtype: Type of its weights; float32 reproduces the training model's logits exactly.
    """

    at_end: bool = True
    dtype: Dtype = Dtype.float32


if TYPE_CHECKING:
    AnyModelConfig = NamedModelConfig | PathModelConfig
    AnyObjectiveConfig = PretrainConfig | DistillConfig
else:
    # OmegaConf supports no union of dataclasses, and accepts subclasses only of the declared class.
    # So a group is declared as Any, and the schema that an option starts from gives it its type.
    AnyModelConfig = AnyObjectiveConfig = DataConfig = ParallelConfig = ScheduleConfig = Any


@dataclass
class TrainerConfig:
    """Configures `python -m trainer`.

    Attributes:
        seed: Seed of initial weights, sample order and dropout.
        nproc: Number of processes on this machine: `auto` takes every GPU, or 1 without a GPU.
            Under torchrun it must agree.
        global_batch_size: Number of samples of one optimizer step, over all ranks.
        micro_batch_size: Largest number of samples of one forward on one rank. The two sizes
            determine accumulation; any number of ranks can share a batch, with sizes that differ by
            one sample.
        deterministic: True uses only deterministic kernels (slower on a GPU).
        compile: True applies torch.compile to each decoder block.
        activation_checkpointing: True recomputes each decoder block in backward instead of storing
            it.
        resume: Checkpoint to start from: `auto` takes the newest valid one of `run.dir`, `never`
            starts anew in an empty `run.dir`, a path names one.
        allow_changes: Keys that may differ from the checkpoint's although they change what is
            trained.
        shutdown_timeout_s: Time that ranks have to save after SIGTERM before they are killed.
        hang_timeout_s: Time without progress on any rank after which the supervisor (nproc above 1)
            prints the stacks of all ranks and restarts them, at most: after 20 steps ten times the
            slowest usual step, and 20 seconds, count as a hang.
    """

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = setting(0, least=0, fix="use 0")
    nproc: str = "auto"
    global_batch_size: int = setting(32, above=0)
    micro_batch_size: int = setting(8, above=0)
    deterministic: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    resume: str = "auto"
    allow_changes: list[str] = field(default_factory=list)
    shutdown_timeout_s: int = setting(600, above=0)
    hang_timeout_s: int = setting(600, above=0)
    stop: StopConfig = field(default_factory=StopConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    fake_quant: FakeQuantConfig = field(default_factory=FakeQuantConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    model: AnyModelConfig = MISSING
    objective: AnyObjectiveConfig = MISSING
    data: DataConfig = MISSING
    parallel: ParallelConfig = MISSING
    optim: AdamWConfig = MISSING
    schedule: ScheduleConfig = MISSING
    precision: PrecisionConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    monitoring: MonitoringConfig = MISSING

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run directory."""
        return Path(self.run.dir).expanduser().absolute()

    @property
    def total_steps(self) -> int | None:
        """Number of steps after which the run is finished; None if only the clock ends it."""
        limits = []
        if self.stop.steps is not None:
            limits.append(self.stop.steps)
        if self.stop.tokens is not None:
            limits.append(-(-self.stop.tokens // (self.global_batch_size * self.data.max_seq_len)))
        return min(limits, default=None)

    def grad_accum_steps(self, world_size: int) -> int:
        """Returns the number of micro-batches of one step on one rank."""
        return -(-self.global_batch_size // (self.micro_batch_size * world_size))

    def check(self, world_size: int) -> None:
        """Raises ConfigError for settings that are not valid together on `world_size` ranks."""
        self.schedule.check(self.total_steps)
        self.parallel.check(world_size, self.precision)
        if self.compile and isinstance(self.parallel, ZeroConfig):
            raise ConfigError(
                "compile", True, "DeepSpeed's hooks break the compiled graph", "use ddp or fsdp"
            )


def resolve(config: TrainerConfig) -> dict[str, Any]:
    """Returns the settings as plain data, to be stored and compared."""
    text = json.dumps(asdict(config), default=_enum_value)
    settings: dict[str, Any] = json.loads(text)
    # Derived, but stored: a resume compares it if the schedule depends on it.
    return settings | {"total_steps": config.total_steps}


def _enum_value(item: object) -> Any:
    if isinstance(item, Enum):
        return item.value
    raise TypeError(f"{type(item).__name__} is not allowed in a configuration")
