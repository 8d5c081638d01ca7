"""The settings of `python -m compression`. Imports no torch, since `--help` reads them."""

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
    DataConfig = Any  # OmegaConf does not accept a union of dataclasses

AUTO = "auto"


def _check_auto_or_count(key: str, value: Any) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value != AUTO and not is_count:
        raise ConfigError(key, value, "must be auto or a whole number above 0", "use auto")


class Target(Enum):
    """Formats in which a result is packed.

    `huggingface`: dense weights (pruned models). `torchao`: torchao's tensors in a Hugging Face
    folder. `compressed_tensors`: the format that transformers and vLLM load. `gguf`: a file for
    llama.cpp. `openvino`: an IR folder for CPUs, made in an environment of its own.
    """

    huggingface = "huggingface"
    torchao = "torchao"
    compressed_tensors = "compressed_tensors"
    gguf = "gguf"
    openvino = "openvino"


@dataclass
class ParentConfig:
    """The model to compress: exactly one of the two. `run=` and `model=` are short for them.

    Attributes:
        run: Run directory whose export is compressed, and whose data is the default.
        model: A Hugging Face folder.
    """

    run: str | None = None
    model: str | None = None


@dataclass
class LayersConfig:
    """The linear layers of the decoder blocks that a recipe changes; the head is never among them.

    Attributes:
        include: Patterns of names of layers that are compressed, such as `*.mlp.*`.
        exclude: Patterns of names of layers that are left unchanged.
    """

    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)


@dataclass
class CalibrationConfig:
    """The samples that methods calibrate with, from the training split of `data`.

    Attributes:
        messages: File of JSON lines with `messages`, rendered by the model's chat template;
            replaces `data` here and in the evaluation, which takes other conversations of the file.
        num_samples: Number of samples, each of `data.max_seq_len` tokens.
        min_tokens: Smallest allowed number of tokens in all samples.
        max_seq_len: Tokens of a sample of `messages`, or of text that the model generates when
            there is no `data`; auto: 512, or the number of the model's positions if that is
            smaller.
    """

    messages: str | None = None
    num_samples: int = setting(128, above=0)
    min_tokens: int = setting(4096, above=0)
    max_seq_len: Any = setting(AUTO, check=_check_auto_or_count)  # OmegaConf knows no `str | int`


@dataclass
class EvaluationConfig:
    """The samples that parent and child are compared on, from the held-out split of `data`.

    Attributes:
        num_samples: Number of samples, each of `data.max_seq_len` tokens.
        speed: Measures tokens/s of parent and child, in alternation, on this machine.
        prompt_tokens: Tokens of the prompt that is timed; auto: 128, or what `new_tokens` leave of
            the model's positions if that is less.
        new_tokens: Tokens that are generated after the prompt that is timed.
        rounds: Number of times that each model is timed.
    """

    num_samples: int = setting(32, above=0)
    speed: bool = True
    prompt_tokens: Any = setting(AUTO, check=_check_auto_or_count)
    new_tokens: int = setting(32, above=0)
    rounds: int = setting(3, above=0)


@dataclass
class GateConfig:
    """Limits that a result has to keep, or no artifact is left; null: no limit.

    Each limit is compared with the worse end of the figure's 95% interval.

    Attributes:
        max_perplexity_ratio: Largest ratio of the child's perplexity to the parent's.
        max_kl: Largest KL(parent || child), in nats a token.
        min_greedy_agreement: Smallest share of tokens for which parent and child predict the same
            most likely next token.
    """

    max_perplexity_ratio: float | None = setting(
        None, above=0, below=math.inf, fix="set null for no limit"
    )
    max_kl: float | None = setting(None, above=0, below=math.inf, fix="set null for no limit")
    min_greedy_agreement: float | None = setting(None, above=0, most=1, fix="set null for no limit")


@dataclass
class CompressionConfig:
    """The settings of one compression: `python -m compression run=... | model=... recipe=...`.

    Attributes:
        parent: The model to compress, see `ParentConfig`.
        out: Folder to write, with one folder for each target; null: `compressed/<recipe>` in the
            run directory, or in the current folder.
        target: One format or a list of formats to pack; null: huggingface for a dense result, else
            compressed_tensors.
        dtype: Type of scales (except for gguf, whose scales are float16) and of everything that is
            not quantized.
        seed: Seed of the order of samples.
        layers: The layers to compress, see `LayersConfig`.
        calibration: The samples to calibrate with, see `CalibrationConfig`.
        evaluation: The comparison with the parent, see `EvaluationConfig`.
        gate: The limits that the result has to keep, see `GateConfig`.
        data: Any data of the trainer; null: the data of the run, or text that the model generates.
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
        """True if the recipe is `auto`, which tries several recipes."""
        return any(isinstance(step, AutoConfig) for step in self.recipe.values())

    @property
    def needs_data(self) -> bool:
        """True if any step uses the activations of the model."""
        return any(step.needs_data for step in self.recipe.values())

    @property
    def has_speed_budget(self) -> bool:
        """True if bits are chosen by the decoding time that they cost."""
        steps = self.recipe.values()
        return any(isinstance(s, MixedConfig) and s.budget_tokens_per_s is not None for s in steps)

    @property
    def recipe_name(self) -> str:
        """Names of the steps joined by +, such as `prune_wanda+int4_gptq`."""
        return "+".join(self.recipe)

    @property
    def targets(self) -> list[Target]:
        """The targets to pack, without repetition; empty for recipe=auto, which chooses its own."""
        if self.target is None and self.is_auto:
            return []
        if self.target is None:
            is_dense = not any(step.quantizes for step in self.recipe.values())
            return [Target.huggingface if is_dense else Target.compressed_tensors]
        names = self.target if isinstance(self.target, list) else [self.target]
        if self.is_auto or "cpu" in names:
            if not self.is_auto or names != ["cpu"]:
                rule = "target=cpu requires recipe=auto, and recipe=auto requires target=cpu"
                raise ConfigError("target", self.target, rule, "use recipe=auto target=cpu")
            return []
        known = ", ".join(target.value for target in Target)
        for name in names:
            if name not in Target.__members__:
                raise ConfigError("target", name, "is not a target", f"choose one of: {known}")
        if not names:
            raise ConfigError("target", "[]", "names no target", f"choose one of: {known}")
        return list(dict.fromkeys(Target[name] for name in names))

    @property
    def scale_dtype(self) -> str:
        """Type of scales, by torch's name."""
        return "float16" if Target.gguf in self.targets else self.dtype.value

    def cross_check(self, key: str) -> None:
        """Raises ConfigError if settings contradict each other."""
        if (self.parent.run is None) == (self.parent.model is None):
            rule = "exactly one of run and model must be given"
            fix = "give run=runs/<name>, or model=<Hugging Face folder>"
            raise ConfigError("run", self.parent.run, rule, fix)
        # All targets pack the same codes, which were chosen for scales rounded to one type.
        if self.scale_dtype == "float16" and len(self.targets) > 1 and self.dtype is Dtype.bfloat16:
            rule = "gguf stores scales in float16, the other targets in bfloat16"
            fix = "set dtype=float32, or pack gguf in a separate command"
            raise ConfigError("target", ",".join(t.value for t in self.targets), rule, fix)
        steps: list[tuple[str, Step]] = list(self.recipe.items())
        if not steps:
            raise ConfigError("recipe", "{}", "has no step", "choose one: recipe=int8_weight_only")
        if self.has_speed_budget and len(self.targets) > 1:
            named = ",".join(target.value for target in self.targets)
            rule = "budget_tokens_per_s applies to the kernels of one target"
            raise ConfigError("target", named, rule, "name one target")
        if self.has_speed_budget and not self.evaluation.speed:
            rule = "budget_tokens_per_s requires a speed measurement"
            raise ConfigError("evaluation.speed", "false", rule, "leave it true")
        if self.is_auto and not self.evaluation.speed:
            rule = "recipe=auto picks the fastest candidate, which requires a speed measurement"
            raise ConfigError("evaluation.speed", "false", rule, "leave it true")
        if self.is_auto and len(steps) > 1:
            rule = "recipe=auto cannot be combined with other steps"
            raise ConfigError("recipe", self.recipe_name, rule, "give recipe=auto alone")
        if isinstance(steps[0][1], HealConfig):
            fix = "prune before it, or train with python -m trainer"
            raise ConfigError("recipe", self.recipe_name, "has no step before heal", fix)
        for (name, step), (following, _) in zip(steps, steps[1:], strict=False):
            if step.quantizes:
                rule = f"{name} quantizes, and {following} cannot change quantized weights"
                raise ConfigError("recipe", self.recipe_name, rule, "quantize last, and once")
