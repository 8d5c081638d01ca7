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
from parallel.config import Dtype, ZeroConfig
from trainer.anomaly import AnomalyConfig
from trainer.data.config import expanded
from trainer.interval import Interval
from trainer.preemption import PreemptionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trainer.objective import Objective


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
    fused_loss: Any = "auto"  # OmegaConf knows no `str | bool`

    def __post_init__(self) -> None:
        if not (self.fused_loss == "auto" or isinstance(self.fused_loss, bool)):
            raise ConfigError(
                "model.fused_loss", self.fused_loss, "is not auto, true or false", "use auto"
            )


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
        super().__post_init__()
        self.path = expanded(self.path)
        if self.keep_zeros and not self.weights:
            raise ConfigError(
                "model.keep_zeros",
                True,
                "random weights have no zeros to keep",
                "use model=pretrained, or remove it",
            )


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
        weight: Of the divergence from the teacher; the rest, to 1, is cross-entropy with the data.
        teacher_dtype: Type in which the teacher is held and computes.
    """

    teacher: str = MISSING
    revision: str | None = None
    temperature: float = 1.0
    weight: float = 1.0
    teacher_dtype: Dtype = Dtype.float32

    def __post_init__(self) -> None:
        self.teacher = expanded(self.teacher)
        # Written so that NaN fails too.
        if not 0 < self.temperature < math.inf:
            raise ConfigError("objective.temperature", self.temperature, "must be above 0", "try 1")
        if not 0 <= self.weight <= 1:
            raise ConfigError("objective.weight", self.weight, "must be in [0, 1]", "try 1")

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


@dataclass
class RunConfig:
    """Which run this is.

    Attributes:
        name: Names the run directory and the run in trackers.
        dir: Everything a run leaves behind is in here.
    """

    name: str = "default"
    dir: str = "runs/${run.name}"


@dataclass
class StopConfig:
    """When to finish: whichever comes first. All three null is refused."""

    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None


@dataclass
class LogConfig:
    """How often to write metrics (each time waits for the device once)."""

    every_steps: int = 10


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

    every_steps: int | None = None
    at_start: bool = False
    max_samples: int | None = 256
    sample_prompt: str | None = None
    sample_tokens: int = 64
    sample_temperature: float = 0.7


@dataclass
class CheckpointConfig:
    """When to save, how many to keep, and where.

    Attributes:
        interval: Between saves: `auto` weighs what a save costs against what a preemption loses, a
            number is steps, `10min` is time, `end` saves only at the end and when told to stop.
        mean_hours_between_preemptions: What `auto` expects until it has seen some.
        keep_last: Committed checkpoints that stay; the oldest go first.
        keep_every: Checkpoints of steps that this divides stay for good; null: none.
        asynchronous: Write in the background; off waits for each checkpoint to be on disk.
        upload: URL of a folder in an object store (`s3://bucket/run`, any fsspec URL) to which each
            checkpoint is copied in the background; a run on a new machine resumes from there.
    """

    interval: str = "auto"
    mean_hours_between_preemptions: float = 6.0
    keep_last: int = 2
    keep_every: int | None = None
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
        bits: Of a weight; null: nothing is rounded.
        group_size: Consecutive inputs that share a scale; null: all of a row.
        scale_dtype: In which the quantized model will hold scales.
    """

    bits: int | None = None
    group_size: int | None = None
    scale_dtype: Dtype = Dtype.bfloat16

    def __post_init__(self) -> None:
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ConfigError("fake_quant.bits", self.bits, "is not from 2 to 8", "use 4 or 8")
        if self.group_size is not None and self.group_size < 1:
            fix = "use 64, or null for a scale a row"
            raise ConfigError("fake_quant.group_size", self.group_size, "must be above 0", fix)
        if self.bits is None and self.group_size is not None:
            rule = "has no effect without fake_quant.bits"
            raise ConfigError("fake_quant.group_size", self.group_size, rule, "set bits, too")


@dataclass
class ExportConfig:
    """The Hugging Face folder.

    Attributes:
        at_end: Write it when the run finishes.
        dtype: Type of its weights; float32 reproduces the training model's logits exactly.
    """

    at_end: bool = True
    dtype: Dtype = Dtype.float32


@dataclass
class TrainerConfig:
    """`python -m trainer`.

    Attributes:
        seed: Of initial weights, sample order and dropout.
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
    seed: int = 0
    nproc: str = "auto"
    global_batch_size: int = 32
    micro_batch_size: int = 8
    deterministic: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    resume: str = "auto"
    allow_changes: list[str] = field(default_factory=list)
    shutdown_timeout_s: int = 600
    hang_timeout_s: int = 600
    stop: StopConfig = field(default_factory=StopConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    fake_quant: FakeQuantConfig = field(default_factory=FakeQuantConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    model: Any = MISSING
    objective: Any = MISSING
    data: Any = MISSING
    parallel: Any = MISSING
    optim: Any = MISSING
    schedule: Any = MISSING
    precision: Any = MISSING
    checkpoint: Any = MISSING
    monitoring: Any = MISSING

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
        self._check_numbers()
        self.schedule.check(self.total_steps)
        self.parallel.check(world_size, self.precision)
        if self.compile and isinstance(self.parallel, ZeroConfig):
            raise ConfigError(
                "compile", True, "DeepSpeed's hooks break the compiled graph", "use ddp or fsdp"
            )

    def _check_numbers(self) -> None:
        if not self.run.name or {"", ".", ".."} & set(self.run.name.split("/")):
            raise ConfigError(
                "run.name",
                self.run.name or "''",
                "names a folder under runs/",
                "use letters, digits, - and _; run.dir may be anywhere",
            )
        positive = {
            "global_batch_size": self.global_batch_size,
            "micro_batch_size": self.micro_batch_size,
            "data.max_seq_len": self.data.max_seq_len,
            "log.every_steps": self.log.every_steps,
            "stop.steps": self.stop.steps,
            "stop.tokens": self.stop.tokens,
            "stop.minutes": self.stop.minutes,
            "evaluation.every_steps": self.evaluation.every_steps,
            "evaluation.max_samples": self.evaluation.max_samples,
            "evaluation.sample_tokens": self.evaluation.sample_tokens,
            "shutdown_timeout_s": self.shutdown_timeout_s,
            "hang_timeout_s": self.hang_timeout_s,
        }
        for key, value in positive.items():
            if value is not None and not value > 0:  # NaN too
                raise ConfigError(key, value, "must be above 0", "give a positive number")
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "must not be below 0", "use 0")
        if not self.evaluation.sample_temperature >= 0:
            raise ConfigError(
                "evaluation.sample_temperature",
                self.evaluation.sample_temperature,
                "must not be below 0",
                "0 takes the likeliest token",
            )
        if self.stop == StopConfig():
            raise ConfigError(
                "stop",
                "null",
                "nothing would end this run",
                "set stop.steps, stop.tokens or stop.minutes",
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
