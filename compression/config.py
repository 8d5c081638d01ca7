"""The settings of `python -m compression`. Imports no torch: `--help` reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from compression.recipe import AutoConfig, HealConfig, MixedConfig, Step
from core.errors import ConfigError
from core.settings.rules import setting
from parallel.config import Dtype

if TYPE_CHECKING:
    from trainer.data.config import DataConfig
else:
    DataConfig = Any  # OmegaConf takes no union of dataclasses

AUTO = "auto"


def _check_auto_or_count(key: str, value: Any) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value != AUTO and not is_count:
        raise ConfigError(key, value, "must be auto or a number above 0", "use auto")


class Target(Enum):
    """How a result is packed.

    `huggingface`: dense weights (pruned models). `torchao`: torchao's tensors in a Hugging Face
    folder. `compressed_tensors`: what transformers and vLLM load. `gguf`: a file for llama.cpp.
    `openvino`: an IR folder for CPUs, made by an environment of its own.
    """

    huggingface = "huggingface"
    torchao = "torchao"
    compressed_tensors = "compressed_tensors"
    gguf = "gguf"
    openvino = "openvino"


@dataclass
class ParentConfig:
    """What is compressed: exactly one of the two. `run=` and `model=` are short for them.

    Attributes:
        run: Run directory whose export is compressed, and whose data is the default.
        model: A Hugging Face folder.
    """

    run: str | None = None
    model: str | None = None


@dataclass
class LayersConfig:
    """Which linear layers of the decoder blocks a recipe is for; the head is never among them.

    Attributes:
        include: Patterns of names of layers that are compressed, as `*.mlp.*`.
        exclude: Patterns of names of layers that stay as they are.
    """

    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)


@dataclass
class CalibrationConfig:
    """What methods that look at data are shown: samples of `data`'s training split.

    Attributes:
        messages: File of JSON lines with `messages`, rendered by the model's chat template; takes
            the place of `data` here and in the evaluation, which sees other conversations of it.
        num_samples: Number of samples, each of `data.max_seq_len` tokens.
        min_tokens: Smallest number of tokens in all samples; fewer are refused.
        max_seq_len: Tokens of a sample of `messages`, or of one that the model makes itself where
            there is no `data`; auto: 512, or the model's positions, if they are fewer.
    """

    messages: str | None = None
    num_samples: int = setting(128, above=0)
    min_tokens: int = setting(4096, above=0)
    max_seq_len: Any = setting(AUTO, check=_check_auto_or_count)  # OmegaConf knows no `str | int`


@dataclass
class EvaluationConfig:
    """What parent and child are compared on: samples of `data`'s held-out split.

    Attributes:
        num_samples: Number of samples, each of `data.max_seq_len` tokens.
        speed: Measure tokens/s of parent and child, in turn, on this machine.
        prompt_tokens: Tokens of the prompt that is timed; auto: 128, or what the model's positions
            leave beside `new_tokens`, if that is less.
        new_tokens: Tokens that are generated after the prompt that is timed.
        rounds: Number of times that each is timed.
    """

    num_samples: int = setting(32, above=0)
    speed: bool = True
    prompt_tokens: Any = setting(AUTO, check=_check_auto_or_count)
    new_tokens: int = setting(32, above=0)
    rounds: int = setting(3, above=0)


@dataclass
class GateConfig:
    """Limits that a result keeps, or does not take its place; null: none.

    Each is held against the worse end of the figure's 95% interval.

    Attributes:
        max_perplexity_ratio: Largest ratio of the child's perplexity to the parent's.
        max_kl: Largest KL(parent || child), in nats a token.
        min_greedy_agreement: Smallest share of tokens at which both find the same next one
            likeliest.
    """

    max_perplexity_ratio: float | None = setting(
        None, above=0, below=math.inf, fix="or null, for none"
    )
    max_kl: float | None = setting(None, above=0, below=math.inf, fix="or null, for none")
    min_greedy_agreement: float | None = setting(None, above=0, most=1, fix="or null, for none")


@dataclass
class CompressionConfig:
    """`python -m compression run=... | model=... recipe=...`.

    Attributes:
        parent: See `ParentConfig`.
        out: Folder to write, one below it a target; null: `compressed/<recipe>` in the run
            directory, or here.
        target: Packings, one or a list; null: huggingface for a dense result, else
            compressed_tensors.
        dtype: Type of scales (but for gguf, which has them in float16) and of all that is not
            quantized.
        seed: Seed of the order of samples.
        layers: See `LayersConfig`.
        calibration: See `CalibrationConfig`.
        evaluation: See `EvaluationConfig`.
        gate: See `GateConfig`.
        data: Any data of the trainer; null: the run's, or text that the model makes itself.
        recipe: Steps in order, by name.
    """

    parent: ParentConfig = field(default_factory=ParentConfig)
    out: str | None = None
    target: Any = None
    dtype: Dtype = Dtype.bfloat16
    seed: int = setting(0, least=0, fix="use 0")
    layers: LayersConfig = field(default_factory=LayersConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    data: DataConfig | None = None
    recipe: Any = MISSING

    @property
    def is_auto(self) -> bool:
        """Whether recipes are to be tried."""
        return any(isinstance(step, AutoConfig) for step in self.recipe.values())

    @property
    def needs_data(self) -> bool:
        """Whether any step looks at what flows through the model."""
        return any(step.needs_data for step in self.recipe.values())

    @property
    def has_speed_budget(self) -> bool:
        """Whether bits are chosen by the time that they take."""
        steps = self.recipe.values()
        return any(isinstance(s, MixedConfig) and s.budget_tokens_per_s is not None for s in steps)

    @property
    def recipe_name(self) -> str:
        """As `prune_wanda+int4_gptq`."""
        return "+".join(self.recipe)

    @property
    def targets(self) -> list[Target]:
        """The packings that are wanted, each once; none for recipe=auto, which chooses."""
        if self.target is None and self.is_auto:
            return []
        if self.target is None:
            is_dense = not any(step.quantizes for step in self.recipe.values())
            return [Target.huggingface if is_dense else Target.compressed_tensors]
        names = self.target if isinstance(self.target, list) else [self.target]
        if self.is_auto or "cpu" in names:
            if not self.is_auto or names != ["cpu"]:
                rule = "recipe=auto, and nothing else, is for target=cpu"
                raise ConfigError("target", self.target, rule, "use recipe=auto target=cpu")
            return []
        known = ", ".join(target.value for target in Target)
        for name in names:
            if name not in Target.__members__:
                raise ConfigError("target", name, "is no target", f"there are: {known}")
        if not names:
            raise ConfigError("target", "[]", "names no target", f"there are: {known}")
        return list(dict.fromkeys(Target[name] for name in names))

    @property
    def scale_dtype(self) -> str:
        """Of scales, by torch's name."""
        return "float16" if Target.gguf in self.targets else self.dtype.value

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for settings that cannot hold together."""
        if (self.parent.run is None) == (self.parent.model is None):
            rule = "exactly one of run and model says what to compress"
            fix = "give run=runs/<name>, or model=<Hugging Face folder>"
            raise ConfigError("run", self.parent.run, rule, fix)
        if self.scale_dtype == "float16" and len(self.targets) > 1 and self.dtype is Dtype.bfloat16:
            rule = "gguf has scales in float16, the others in bfloat16: one would round them again"
            fix = "set dtype=float32, or leave gguf to a command of its own"
            raise ConfigError("target", ",".join(t.value for t in self.targets), rule, fix)
        steps: list[tuple[str, Step]] = list(self.recipe.items())
        if not steps:
            raise ConfigError("recipe", "{}", "has no step", "choose one: recipe=int8_weight_only")
        if self.has_speed_budget and len(self.targets) > 1:
            named = ",".join(target.value for target in self.targets)
            rule = "budget_tokens_per_s is of one target's kernels"
            raise ConfigError("target", named, rule, "name one target")
        if self.has_speed_budget and not self.evaluation.speed:
            rule = "budget_tokens_per_s has to be measured"
            raise ConfigError("evaluation.speed", "false", rule, "leave it true")
        if self.is_auto and not self.evaluation.speed:
            rule = "auto picks what is fastest"
            raise ConfigError("evaluation.speed", "false", rule, "leave it true")
        if self.is_auto and len(steps) > 1:
            rule = "auto tries whole recipes"
            raise ConfigError("recipe", self.recipe_name, rule, "name it alone")
        if isinstance(steps[0][1], HealConfig):
            fix = "prune before it, or train with python -m trainer"
            raise ConfigError("recipe", self.recipe_name, "begins with nothing to heal", fix)
        for (name, step), (following, _) in zip(steps, steps[1:], strict=False):
            if step.quantizes:
                rule = f"{name} leaves codes, which {following} cannot change"
                raise ConfigError("recipe", self.recipe_name, rule, "quantize last, and once")
