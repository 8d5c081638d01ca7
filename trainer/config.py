"""The trainer's settings: the root of the tree.

A package's dataclasses live beside their consumer, or in the package's `config.py` where the
consumer imports torch: composing a config (for `--help`, for the planner) must not. A config with a
leaf behind it has `build()`. `schemas.py` tells Hydra about them.
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
from trainer.optim import AdamWConfig
from trainer.preemption import PreemptionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from parallel.config import ParallelConfig
    from trainer.data.config import DataConfig
    from trainer.objective import Objective
    from trainer.schedule import ScheduleConfig


@dataclass
class ModelConfig:
    """What every kind of model has.

    Attributes:
        attn_implementation: Transformers' name of the attention kernel; null: as it chooses.
        fused_loss: Compute head and cross-entropy together, in chunks, so that the logits of a
            batch are never held: `auto` where the model's logits are the product of its hidden
            states and its head, as is tried before the first step; `true` refuses a model that does
            more; `false` has transformers compute the logits.
    """

    attn_implementation: str | None = "sdpa"
    fused_loss: Any = "auto"  # OmegaConf would make the text "true" of true with `str | bool`

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for a way to compute the loss that there is not."""
        if not (self.fused_loss == "auto" or isinstance(self.fused_loss, bool)):
            rule = "must be auto, true or false"
            raise ConfigError(f"{key}.fused_loss", self.fused_loss, rule, "use auto")


@dataclass
class NamedModelConfig(ModelConfig):
    """A model described here, with random weights (`model=tiny`, `model=llama_8b`, ...).

    Attributes:
        model_type: Transformers' name of the architecture, e.g. `llama`.
        vocab_size: Rows of the embedding; null: the tokenizer's, up to a multiple of 64.
        config: Further fields of that architecture's transformers config.
    """

    model_type: str = MISSING
    vocab_size: int | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class PathModelConfig(ModelConfig):
    """A model described by a Hugging Face folder or hub name.

    Attributes:
        path: Folder or hub name.
        revision: Commit, tag or branch of a hub repository.
        weights: Load its weights (`model=pretrained`), or draw random ones (`model=config`).
        keep_zeros: Weights of its matrices (not of embeddings) that are exactly zero stay so, as
            fine-tuning of a pruned model wants.
    """

    path: str = MISSING
    revision: str | None = None
    weights: bool = True
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        self.path = expanded(self.path)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError, too, for zeros of random weights, which have none."""
        super().cross_check(key)
        if self.keep_zeros and not self.weights:
            rule = "random weights have no zeros to keep"
            fix = "use model=pretrained, or remove it"
            raise ConfigError(f"{key}.keep_zeros", True, rule, fix)


@dataclass
class PretrainConfig:
    """Predict the next token of the data."""

    def build(
        self, model: PreTrainedModel, config: ModelConfig, tokenizer_fingerprint: str
    ) -> Objective:
        from trainer.objective import NextTokenLoss

        return NextTokenLoss(model, config.fused_loss is not False)


@dataclass
class DistillConfig:
    """Predict what a larger model, the teacher, predicts (Hinton et al., arXiv 1503.02531).

    Pruned language models are healed by the divergence alone, without cross-entropy (Minitron,
    arXiv 2407.14679 and 2408.11796), and at temperature 1 the distributions are those that models
    are used with: so are the defaults. FSDP and ZeRO-3 shard the teacher; under DDP and ZeRO 1 and
    2 every rank holds it whole.

    Attributes:
        teacher: Hugging Face folder or hub name of a model with the student's vocabulary.
        revision: Commit, tag or branch of a hub repository.
        temperature: Logits of both are divided by it.
        weight: Share of the divergence from the teacher in the loss; the rest, to 1, is
            cross-entropy with the data.
        teacher_dtype: Type in which the teacher is held and computes.
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

        teacher = build_teacher(self, model, config, tokenizer_fingerprint)
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
    """Which run this is.

    Attributes:
        name: Names the run directory and the run in trackers.
        dir: Folder that everything a run leaves behind is in.
    """

    name: str = setting("default", check=_check_run_name)
    dir: str = "runs/${run.name}"


@dataclass
class StopConfig:
    """When to finish: whichever comes first.

    Attributes:
        steps: Optimizer steps; null: as many as the others allow. All three null is refused.
        tokens: Tokens that the model is trained on; null: as for steps.
        minutes: Time on the clock; null: as for steps.
    """

    steps: int | None = setting(None, above=0)
    tokens: int | None = setting(None, above=0)
    minutes: float | None = setting(None, above=0)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError where no limit is set."""
        if self == StopConfig():
            fix = f"set {key}.steps, {key}.tokens or {key}.minutes"
            raise ConfigError(key, "null", "nothing would end this run", fix)


@dataclass
class LogConfig:
    """How often metrics are written.

    Attributes:
        every_steps: Steps from one line of metrics to the next; each waits for the device once.
    """

    every_steps: int = setting(10, above=0)


@dataclass
class EvaluationConfig:
    """Validation loss and a generated sample.

    Attributes:
        every_steps: Steps between evaluations; null evaluates at the end only.
        at_start: Evaluate before the first step, too, as step 0; a resumed run does not.
        max_samples: Held-out samples of `data.max_seq_len` tokens to use; null uses all.
        sample_prompt: Text to continue at each evaluation; an empty one begins a text, null
            generates nothing.
        sample_tokens: Tokens to generate.
        sample_temperature: 0 takes the likeliest token; small models then repeat themselves.
    """

    every_steps: int | None = setting(None, above=0)
    at_start: bool = False
    max_samples: int | None = setting(256, above=0)
    sample_prompt: str | None = None
    sample_tokens: int = setting(64, above=0)
    sample_temperature: float = setting(0.7, least=0, fix="0 takes the likeliest token")


@dataclass
class CheckpointConfig:
    """When to save, how many to keep, and where.

    Attributes:
        interval: Time between saves: `auto` weighs what a save costs against what a preemption
            loses, a number is steps, `10min` is time, `end` saves only at the end and when told to
            stop.
        mean_hours_between_preemptions: Hours between two preemptions that `auto` expects until it
            has seen some.
        keep_last: Number of committed checkpoints that stay; the oldest go first.
        keep_every: Checkpoints of steps that this divides stay for good; null: none.
        asynchronous: Write in the background; off waits for each checkpoint to be on disk.
        upload: URL of a folder in an object store (`s3://bucket/run`, any fsspec URL) to which each
            checkpoint is copied in the background; a run on a new machine resumes from there.
    """

    interval: str = setting("auto", check=lambda _, text: Interval.parse(text))
    mean_hours_between_preemptions: float = setting(6.0, above=0, fix="use 6")
    keep_last: int = setting(2, least=1, fix="use 2")
    keep_every: int | None = setting(None, least=1, fix="use 1000, or null")
    asynchronous: bool = True
    upload: str | None = None

    def __post_init__(self) -> None:
        Interval.parse(self.interval)
        if self.keep_last < 1:
            raise ConfigError("checkpoint.keep_last", self.keep_last, "must be at least 1", "use 2")
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(
                "checkpoint.keep_every", self.keep_every, "must be at least 1", "use 1000, or null"
            )
        if not self.mean_hours_between_preemptions > 0:
            raise ConfigError(
                "checkpoint.mean_hours_between_preemptions",
                self.mean_hours_between_preemptions,
                "must be above 0",
                "use 6",
            )


@dataclass
class FakeQuantConfig:
    """Weights of linear layers in decoder blocks are rounded in forward (trainer/fake_quant.py).

    Attributes:
        bits: Bits of a rounded weight; null: nothing is rounded.
        group_size: Consecutive inputs that share a scale; null: all of a row.
        scale_dtype: Type in which the quantized model will hold scales.
    """

    bits: int | None = setting(None, least=2, most=8, fix="use 4 or 8")
    group_size: int | None = setting(None, above=0, fix="use 64, or null for a scale a row")
    scale_dtype: Dtype = Dtype.bfloat16

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for groups of weights that nothing rounds."""
        if self.bits is None and self.group_size is not None:
            rule = f"has no effect without {key}.bits"
            raise ConfigError(f"{key}.group_size", self.group_size, rule, "set bits, too")


@dataclass
class ExportConfig:
    """The Hugging Face folder.

    Attributes:
        at_end: Write the folder when the run finishes.
        dtype: Type of its weights; float32 reproduces the training model's logits exactly.
    """

    at_end: bool = True
    dtype: Dtype = Dtype.float32


if TYPE_CHECKING:
    AnyModelConfig = NamedModelConfig | PathModelConfig
    AnyObjectiveConfig = PretrainConfig | DistillConfig
else:
    # OmegaConf takes no union of dataclasses, and a subclass only of the one that is named: to it a
    # group is anything, and the schema that an option starts from types it.
    AnyModelConfig = AnyObjectiveConfig = DataConfig = ParallelConfig = ScheduleConfig = Any


@dataclass
class TrainerConfig:
    """`python -m trainer`.

    Attributes:
        seed: Seed of initial weights, sample order and dropout.
        nproc: Processes on this machine: `auto` takes every GPU, else 1. Under torchrun it must
            agree.
        global_batch_size: Samples of one optimizer step, over all ranks.
        micro_batch_size: Samples of one forward on one rank, at most. Accumulation follows from the
            two, and any number of ranks can share a batch: sizes differ by one sample then.
        deterministic: Only deterministic kernels (slower on a GPU).
        compile: torch.compile each decoder block.
        activation_checkpointing: Recompute each decoder block in backward instead of storing it.
        resume: `auto` goes on from the newest valid checkpoint of `run.dir`, `never` starts anew in
            an empty one, and a path resumes from that checkpoint.
        allow_changes: Keys that may differ from the checkpoint's although they change what is
            trained.
        shutdown_timeout_s: How long ranks may take to save after SIGTERM before they are killed.
        hang_timeout_s: How long all ranks may show no progress before the supervisor (nproc above
            1) prints their stacks and starts them again.
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
        """Steps after which the run is finished; None when only the clock ends it."""
        limits = []
        if self.stop.steps is not None:
            limits.append(self.stop.steps)
        if self.stop.tokens is not None:
            limits.append(-(-self.stop.tokens // (self.global_batch_size * self.data.max_seq_len)))
        return min(limits, default=None)

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-batches of one step on one rank."""
        return -(-self.global_batch_size // (self.micro_batch_size * world_size))

    def check(self, world_size: int) -> None:
        """Raises ConfigError for settings that cannot hold together on `world_size` ranks."""
        self.schedule.check(self.total_steps)
        self.parallel.check(world_size, self.precision)
        if self.compile and isinstance(self.parallel, ZeroConfig):
            raise ConfigError(
                "compile", True, "DeepSpeed's hooks break the compiled graph", "use ddp or fsdp"
            )


def resolve(config: TrainerConfig) -> dict[str, Any]:
    """The settings as plain data, to be stored and compared."""
    text = json.dumps(asdict(config), default=_enum_value)
    settings: dict[str, Any] = json.loads(text)
    return settings | {"total_steps": config.total_steps}


def _enum_value(item: object) -> Any:
    if isinstance(item, Enum):
        return item.value
    raise TypeError(f"{type(item).__name__} has no place in a configuration")
