"""The steps of a recipe, as a user sets them. Imports no torch: `--help` reads it.

`build()` imports the method that a step stands for; nothing else maps the one to the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Protocol

from compression.scheme import Activation, Number, Scheme
from core.errors import ConfigError

if TYPE_CHECKING:
    from compression.block import Block


class Method(Protocol):
    """What a step does with one decoder block after another.

    Attributes:
        needs_data: Whether it looks at what flows through the block.
    """

    @property
    def needs_data(self) -> bool: ...

    def apply(self, block: Block) -> None:
        """Changes the block's layers in place."""
        ...


class Criterion(Enum):
    """By what a weight is judged; wanda and sparsegpt look at its input as well."""

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"


class Pattern(Enum):
    """Where zeros may be: anywhere, or so many in each run of inputs."""

    unstructured = "unstructured"
    two_of_four = "two_of_four"
    four_of_eight = "four_of_eight"

    @property
    def kept_of(self) -> tuple[int, int]:
        """Weights that stay in a run, and its length."""
        return {Pattern.two_of_four: (2, 4), Pattern.four_of_eight: (4, 8)}[self]


@dataclass
class StepConfig:
    """What every quantizing step has.

    Attributes:
        bits: Of a weight.
        group_size: Consecutive inputs that share a scale; null: all of a row.
        symmetric: Without zero points; every engine reads that.
    """

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    quantizes: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    def scheme(self, key: str) -> Scheme:
        """What a weight becomes.

        Args:
            key: The step's, for its errors.
        """
        scheme = Scheme(Number.int, self.bits, self.group_size, self.symmetric)
        scheme.check(key)
        return scheme


@dataclass
class RoundConfig(StepConfig):
    """Round to nearest; needs no data.

    Attributes:
        number: `int`, or `float8` (e4m3).
        activation: In which numbers a layer's input is rounded when the model runs.
    """

    number: Number = Number.int
    activation: Activation = Activation.none
    needs_data: ClassVar[bool] = False

    def scheme(self, key: str) -> Scheme:
        scheme = Scheme(self.number, self.bits, self.group_size, self.symmetric, self.activation)
        scheme.check(key)
        return scheme

    def build(self, key: str) -> Method:
        """The method."""
        from compression.methods.rounding import RoundToNearest

        return RoundToNearest(self.scheme(key))


@dataclass
class GptqConfig(StepConfig):
    """GPTQ.

    Attributes:
        damping: Share of the mean squared input that is added to each input's.
    """

    bits: int = 4
    group_size: int | None = 128
    damping: float = 0.01

    def build(self, key: str) -> Method:
        """The method."""
        from compression.methods.gptq import Gptq

        _check_damping(key, self.damping)
        return Gptq(self.scheme(key), self.damping)


@dataclass
class AwqConfig(StepConfig):
    """AWQ."""

    bits: int = 4
    group_size: int | None = 128

    def build(self, key: str) -> Method:
        """The method."""
        from compression.methods.equalizing import Awq

        return Awq(self.scheme(key))


@dataclass
class MixedConfig(StepConfig):
    """Few bits where they cost little, more elsewhere, by GPTQ: within a budget, by measured KL.

    Attributes:
        bits: Of a weight where few will do.
        high_bits: Of a weight elsewhere.
        group_size: As in the other steps, for both.
        budget_bits: Of a weight in the mean, scales counted; or
        budget_mb: of all quantized weights, scales counted; or
        budget_tokens_per_s: of decoding on this machine as `evaluation` times it, with the kernels
            that the target runs.
        samples: Of the calibration, on which the KL is measured.
        damping: As in GPTQ.
    """

    bits: int = 4
    high_bits: int = 8
    group_size: int | None = 128
    budget_bits: float | None = 5.0
    budget_mb: float | None = None
    budget_tokens_per_s: float | None = None
    samples: int = 4
    damping: float = 0.01

    def schemes(self, key: str) -> tuple[Scheme, Scheme]:
        """Of few bits and of more."""
        _check_damping(key, self.damping)
        if self.high_bits <= self.bits:
            rule = f"is not above bits={self.bits}"
            raise ConfigError(f"{key}.high_bits", self.high_bits, rule, "use 8")
        budgets = {
            "budget_mb": self.budget_mb,
            "budget_tokens_per_s": self.budget_tokens_per_s,
            "budget_bits": self.budget_bits,
        }
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) != 1:
            name = given[0] if given else "budget_bits"
            rule = "exactly one of budget_bits, budget_mb and budget_tokens_per_s is the budget"
            fix = f"set one of them, and {key}.budget_bits=null beside another"
            raise ConfigError(f"{key}.{name}", budgets[name], rule, fix)
        if self.budget_tokens_per_s is not None and not 0 < self.budget_tokens_per_s < math.inf:
            value = self.budget_tokens_per_s
            raise ConfigError(f"{key}.budget_tokens_per_s", value, "must be above 0", "lower it")
        if self.samples < 1:
            raise ConfigError(f"{key}.samples", self.samples, "must be above 0", "use 4")
        high = Scheme(Number.int, self.high_bits, self.group_size, self.symmetric)
        high.check(key)
        return self.scheme(key), high

    def build(self, key: str) -> Method:
        """The method, before it is known which layers have more bits."""
        from compression.methods.gptq import Gptq

        return Gptq(self.schemes(key)[0], self.damping)


@dataclass
class SmoothQuantConfig(StepConfig):
    """SmoothQuant: int8 weights and int8 inputs.

    Attributes:
        migration: How much of an outlier moves from inputs (0) into weights (1).
    """

    migration: float = 0.5

    def scheme(self, key: str) -> Scheme:
        if not 0 <= self.migration <= 1:
            rule = "is not from 0 to 1"
            raise ConfigError(f"{key}.migration", self.migration, rule, "use 0.5")
        scheme = Scheme(Number.int, self.bits, self.group_size, self.symmetric, Activation.int8)
        scheme.check(key)
        return scheme

    def build(self, key: str) -> Method:
        """The method."""
        from compression.methods.equalizing import SmoothQuant

        return SmoothQuant(self.scheme(key), self.migration)


@dataclass
class PruneConfig:
    """Zeroes weights; the model keeps its shape, and no common kernel is faster for it.

    Attributes:
        criterion: Which weights go.
        sparsity: Share of each layer's weights; two_of_four and four_of_eight are half.
        pattern: Where the zeros may be.
        damping: As in GPTQ; for sparsegpt.
    """

    criterion: Criterion = Criterion.wanda
    sparsity: float = 0.5
    pattern: Pattern = Pattern.unstructured
    damping: float = 0.01
    quantizes: ClassVar[bool] = False

    @property
    def needs_data(self) -> bool:
        """Whether it looks at inputs."""
        return self.criterion is not Criterion.magnitude

    def build(self, key: str) -> Method:
        """The method."""
        from compression.methods.pruning import Prune

        _check_damping(key, self.damping)
        if not 0 < self.sparsity < 1:
            rule = "is not between 0 and 1"
            raise ConfigError(f"{key}.sparsity", self.sparsity, rule, "use 0.5")
        if self.pattern is not Pattern.unstructured and self.sparsity != 0.5:
            rule = f"{self.pattern.value} is half"
            raise ConfigError(f"{key}.sparsity", self.sparsity, rule, "use 0.5")
        return Prune(self.criterion, self.sparsity, self.pattern, self.damping)


@dataclass
class HealConfig:
    """Trains what was pruned towards its parent, by the trainer; zeros that were put stay zeros.

    Attributes:
        tokens: To train on.
        lr: Largest learning rate.
        global_batch_size: Samples of a step.
        overrides: More words for the trainer, as `parallel=fsdp` or `nproc=8`.
    """

    tokens: int = 2_000_000
    lr: float = 1e-4
    global_batch_size: int = 16
    overrides: list[str] = field(default_factory=list)
    quantizes: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False  # it trains

    def check(self, key: str) -> None:
        """Raises ConfigError for numbers that cannot be."""
        for name in ("tokens", "lr", "global_batch_size"):
            if not 0 < getattr(self, name) < math.inf:
                rule = "must be above 0, and a number"
                raise ConfigError(f"{key}.{name}", getattr(self, name), rule, "give more")

    def check_one_step(self, key: str, max_seq_len: int) -> None:
        """Raises ConfigError for less to train on than one step takes.

        Args:
            key: The step's of the recipe, for errors.
            max_seq_len: Tokens of a sample.
        """
        least = self.global_batch_size * max_seq_len
        if self.tokens < least:
            rule = f"one step takes {least}: {self.global_batch_size} samples of {max_seq_len}"
            fix = f"give more, or lower {key}.global_batch_size or data.max_seq_len"
            raise ConfigError(f"{key}.tokens", self.tokens, rule, fix)


@dataclass
class StructuredPruneConfig:
    """Makes the model itself smaller; what comes out is an ordinary Hugging Face model.

    Each width is given as the share of it that goes (below 1), or as the size that stays (from 1
    on); or `params` chooses them.

    Attributes:
        heads: Key-value heads, each with the query heads that share it.
        mlp: `intermediate_size`.
        hidden: `hidden_size`, the channels of the residual stream.
        depth: Whole blocks.
        params: Share of the parameters that goes, embeddings and head counted; null: as above.
        multiple_of: What `mlp` and `hidden` become by a share is a multiple of it.
        refit: Fit what is left of `o_proj` and `down_proj` to the parent's residual stream.
        damping: Share of the mean squared input that holds a refit at the weights it starts from;
            with less of it, text unlike the calibration loses what the refit gains elsewhere.
    """

    heads: float = 0.0
    mlp: float = 0.0
    hidden: float = 0.0
    depth: float = 0.0
    params: float | None = None
    multiple_of: int = 8
    refit: bool = True
    damping: float = 0.3
    quantizes: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def check(self, key: str) -> None:
        """Raises ConfigError for settings that no model can be pruned by.

        Args:
            key: The step's, for its errors.
        """
        _check_damping(key, self.damping, usual=0.3)
        if self.multiple_of < 1:
            raise ConfigError(f"{key}.multiple_of", self.multiple_of, "is below 1", "use 8")
        widths = {name: getattr(self, name) for name in ("heads", "mlp", "hidden", "depth")}
        for name, value in widths.items():
            if not (0 <= value < 1 or (value >= 1 and value == int(value))):
                rule = "is neither a share from 0 to below 1 nor a whole size"
                raise ConfigError(f"{key}.{name}", value, rule, "0.25 removes a quarter")
        if self.params is None:
            return
        if not 0 < self.params < 1:
            rule = "is not between 0 and 1"
            raise ConfigError(f"{key}.params", self.params, rule, "0.25 removes a quarter")
        for name, value in widths.items():
            if value:
                fix = f"set {key}.params=null, or leave {name} out"
                raise ConfigError(f"{key}.{name}", value, "is chosen by params", fix)


@dataclass
class QatConfig:
    """Trains on with weights that are rounded in forward, towards the parent; then rounds them.

    Attributes:
        bits: Of a weight.
        group_size: Consecutive inputs that share a scale; null: all of a row.
        tokens: To train on.
        lr: Largest learning rate.
        global_batch_size: Samples of a step.
        overrides: More words for the trainer.
    """

    bits: int = 4
    group_size: int | None = 128
    tokens: int = 2_000_000
    lr: float = 2e-5
    global_batch_size: int = 16
    overrides: list[str] = field(default_factory=list)
    quantizes: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False  # it trains

    def rounding(self) -> RoundConfig:
        """What the trained weights are rounded by, as they were in forward."""
        return RoundConfig(bits=self.bits, group_size=self.group_size)

    def scheme(self, key: str) -> Scheme:
        """What a weight becomes."""
        return self.rounding().scheme(key)

    def training(self, scale_dtype: str = "bfloat16") -> HealConfig:
        """How it is trained, for scales of that type."""
        words = [f"fake_quant.bits={self.bits}", f"fake_quant.scale_dtype={scale_dtype}"]
        if self.group_size is not None:
            words.append(f"fake_quant.group_size={self.group_size}")
        return HealConfig(self.tokens, self.lr, self.global_batch_size, [*words, *self.overrides])

    def check(self, key: str) -> None:
        """Raises ConfigError for numbers that cannot be."""
        self.training().check(key)
        self.scheme(key)

    def check_one_step(self, key: str, max_seq_len: int) -> None:
        """Raises ConfigError for less to train on than one step takes; see `HealConfig`."""
        self.training().check_one_step(key, max_seq_len)


@dataclass
class AutoConfig:
    """Tries recipes on this machine and keeps the fastest that is good enough (target=cpu).

    Attributes:
        max_perplexity_ratio: Of a child's to the parent's.
    """

    max_perplexity_ratio: float = 1.02
    quantizes: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    def check(self, key: str) -> None:
        """Raises ConfigError for a ratio that cannot be."""
        if not self.max_perplexity_ratio > 0:
            value = self.max_perplexity_ratio
            raise ConfigError(f"{key}.max_perplexity_ratio", value, "must be above 0", "use 1.02")


# Steps that work on a block after another, and those that need the whole model.
BlockStep = RoundConfig | GptqConfig | AwqConfig | SmoothQuantConfig | MixedConfig | PruneConfig
ModelStep = StructuredPruneConfig | HealConfig | QatConfig | AutoConfig
Step = BlockStep | ModelStep


def _check_damping(key: str, damping: float, usual: float = 0.01) -> None:
    if not 0 < damping < 1:
        raise ConfigError(f"{key}.damping", damping, "is not between 0 and 1", f"use {usual}")
