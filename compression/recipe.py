"""The steps of a recipe, as a user sets them. Imports no torch: `--help` reads it.

`build()` imports the method that a step stands for; nothing else maps the one to the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

from compression.scheme import Activation, Number, Scheme
from core.errors import ConfigError
from core.settings.rules import setting

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


# What several steps have.
_bits = partial(setting, least=2, most=8, fix="use 4 or 8")
_group_size = partial(setting, above=0, fix="use 128, or null for a scale a row")
_damping = partial(setting, above=0, below=1, fix="use 0.01")
_of_training = partial(setting, above=0, below=math.inf, fix="give more")


def _check_width(key: str, value: float) -> None:
    if not (0 <= value < 1 or (value >= 1 and value == int(value))):
        rule = "must be a share, from 0 to below 1, or a whole size"
        raise ConfigError(key, value, rule, "0.25 removes a quarter")


@dataclass
class StepConfig:
    """What every quantizing step has.

    Attributes:
        bits: Bits of a weight.
        group_size: Consecutive inputs that share a scale; null: all of a row.
        symmetric: Have no zero points, which every engine reads.
    """

    bits: int = _bits(8)
    group_size: int | None = _group_size(None)
    symmetric: bool = True
    quantizes: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    def scheme(self) -> Scheme:
        """Returns what a weight becomes."""
        return Scheme(Number.int, self.bits, self.group_size, self.symmetric)


@dataclass
class RoundConfig(StepConfig):
    """Round to nearest; needs no data.

    Attributes:
        number: Kind of the numbers: `int`, or `float8` (e4m3).
        activation: Numbers in which a layer's input is rounded when the model runs.
    """

    number: Number = Number.int
    activation: Activation = Activation.none
    needs_data: ClassVar[bool] = False

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for float8 with what only whole numbers have."""
        is_plain = self.bits == 8 and self.symmetric and self.group_size is None
        if self.number is Number.float8 and not is_plain:
            rule = "float8 has 8 bits, no zero point and a scale a row"
            raise ConfigError(f"{key}.number", "float8", rule, "leave bits and group_size alone")

    def scheme(self) -> Scheme:
        return Scheme(self.number, self.bits, self.group_size, self.symmetric, self.activation)

    def build(self) -> Method:
        """Returns the method."""
        from compression.methods.rounding import RoundToNearest

        return RoundToNearest(self.scheme())


@dataclass
class GptqConfig(StepConfig):
    """GPTQ.

    Attributes:
        damping: Share of the mean squared input that is added to each input's.
    """

    bits: int = _bits(4)
    group_size: int | None = _group_size(128)
    damping: float = _damping(0.01)

    def build(self) -> Method:
        """Returns the method."""
        from compression.methods.gptq import Gptq

        return Gptq(self.scheme(), self.damping)


@dataclass
class AwqConfig(StepConfig):
    """AWQ."""

    bits: int = _bits(4)
    group_size: int | None = _group_size(128)

    def build(self) -> Method:
        """Returns the method."""
        from compression.methods.equalizing import Awq

        return Awq(self.scheme())


@dataclass
class MixedConfig(StepConfig):
    """Few bits where they cost little, more elsewhere, by GPTQ: within a budget, by measured KL.

    Attributes:
        bits: Bits of a weight where few will do.
        high_bits: Bits of a weight elsewhere.
        group_size: Consecutive inputs that share a scale, for both; null: all of a row.
        budget_bits: Bits of a weight in the mean, scales counted: one of three budgets.
        budget_mb: Megabytes of all quantized weights, scales counted: one of three budgets.
        budget_tokens_per_s: Speed of decoding on this machine as `evaluation` times it, with the
            kernels that the target runs: one of three budgets.
        samples: Samples of the calibration on which the KL is measured.
        damping: Share of the mean squared input that is added to each input's.
    """

    bits: int = _bits(4)
    high_bits: int = _bits(8)
    group_size: int | None = _group_size(128)
    budget_bits: float | None = 5.0
    budget_mb: float | None = None
    budget_tokens_per_s: float | None = setting(None, above=0, below=math.inf, fix="lower it")
    samples: int = setting(4, above=0, fix="use 4")
    damping: float = _damping(0.01)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError unless there are two widths, and one budget."""
        if self.high_bits <= self.bits:
            rule = f"must be above bits={self.bits}"
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

    def schemes(self) -> tuple[Scheme, Scheme]:
        """Returns what a weight becomes with few bits, and with more."""
        high = Scheme(Number.int, self.high_bits, self.group_size, self.symmetric)
        return self.scheme(), high

    def build(self) -> Method:
        """Returns the method, before it is known which layers have more bits."""
        from compression.methods.gptq import Gptq

        return Gptq(self.scheme(), self.damping)


@dataclass
class SmoothQuantConfig(StepConfig):
    """SmoothQuant: int8 weights and int8 inputs.

    Attributes:
        migration: Share of an outlier that moves from inputs (0) into weights (1).
    """

    migration: float = setting(0.5, least=0, most=1, fix="use 0.5")

    def scheme(self) -> Scheme:
        return Scheme(Number.int, self.bits, self.group_size, self.symmetric, Activation.int8)

    def build(self) -> Method:
        """Returns the method."""
        from compression.methods.equalizing import SmoothQuant

        return SmoothQuant(self.scheme(), self.migration)


@dataclass
class PruneConfig:
    """Zeroes weights; the model keeps its shape, and no common kernel is faster for it.

    Attributes:
        criterion: Rule by which weights go.
        sparsity: Share of each layer's weights that go; two_of_four and four_of_eight are half.
        pattern: Places where the zeros may be.
        damping: Share of the mean squared input that is added to each input's, for sparsegpt.
    """

    criterion: Criterion = Criterion.wanda
    sparsity: float = setting(0.5, above=0, below=1, fix="use 0.5")
    pattern: Pattern = Pattern.unstructured
    damping: float = _damping(0.01)
    quantizes: ClassVar[bool] = False

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for a pattern that another share of zeros makes."""
        if self.pattern is not Pattern.unstructured and self.sparsity != 0.5:
            rule = f"{self.pattern.value} is half"
            raise ConfigError(f"{key}.sparsity", self.sparsity, rule, "use 0.5")

    @property
    def needs_data(self) -> bool:
        """Whether it looks at inputs."""
        return self.criterion is not Criterion.magnitude

    def build(self) -> Method:
        """Returns the method."""
        from compression.methods.pruning import Prune

        return Prune(self.criterion, self.sparsity, self.pattern, self.damping)


@dataclass
class HealConfig:
    """Trains what was pruned towards its parent, by the trainer; zeros that were put stay zeros.

    Attributes:
        tokens: Tokens to train on.
        lr: Largest learning rate.
        global_batch_size: Samples of a step.
        overrides: More words for the trainer, as `parallel=fsdp` or `nproc=8`.
    """

    tokens: int = _of_training(2_000_000)
    lr: float = _of_training(1e-4)
    global_batch_size: int = _of_training(16)
    overrides: list[str] = field(default_factory=list)
    quantizes: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False  # it trains

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
        mlp: Width of the MLPs (`intermediate_size`).
        hidden: Channels of the residual stream (`hidden_size`).
        depth: Whole decoder blocks.
        params: Share of the parameters that goes, embeddings and head counted; null: the widths
            above say what goes.
        multiple_of: Number that `mlp` and `hidden` are a multiple of where they become smaller by a
            share.
        refit: Fit what is left of `o_proj` and `down_proj` to the parent's residual stream.
        damping: Share of the mean squared input that holds a refit at the weights it starts from;
            with less of it, text unlike the calibration loses what the refit gains elsewhere.
    """

    heads: float = setting(0.0, check=_check_width)
    mlp: float = setting(0.0, check=_check_width)
    hidden: float = setting(0.0, check=_check_width)
    depth: float = setting(0.0, check=_check_width)
    params: float | None = setting(None, above=0, below=1, fix="0.25 removes a quarter")
    multiple_of: int = setting(8, least=1, fix="use 8")
    refit: bool = True
    damping: float = _damping(0.3)
    quantizes: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for widths beside `params`, which chooses them."""
        if self.params is None:
            return
        for name in ("heads", "mlp", "hidden", "depth"):
            if value := getattr(self, name):
                fix = f"set {key}.params=null, or leave {name} out"
                raise ConfigError(f"{key}.{name}", value, "is chosen by params", fix)


@dataclass
class QatConfig:
    """Trains on with weights that are rounded in forward, towards the parent; then rounds them.

    Attributes:
        bits: Bits of a weight.
        group_size: Consecutive inputs that share a scale; null: all of a row.
        tokens: Tokens to train on.
        lr: Largest learning rate.
        global_batch_size: Samples of a step.
        overrides: More words for the trainer.
    """

    bits: int = _bits(4)
    group_size: int | None = _group_size(128)
    tokens: int = _of_training(2_000_000)
    lr: float = _of_training(2e-5)
    global_batch_size: int = _of_training(16)
    overrides: list[str] = field(default_factory=list)
    quantizes: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False  # it trains

    def rounding(self) -> RoundConfig:
        """What the trained weights are rounded by, as they were in forward."""
        return RoundConfig(bits=self.bits, group_size=self.group_size)

    def scheme(self) -> Scheme:
        """Returns what a weight becomes."""
        return self.rounding().scheme()

    def training(self, scale_dtype: str = "bfloat16") -> HealConfig:
        """How it is trained, for scales of that type."""
        words = [f"fake_quant.bits={self.bits}", f"fake_quant.scale_dtype={scale_dtype}"]
        if self.group_size is not None:
            words.append(f"fake_quant.group_size={self.group_size}")
        return HealConfig(self.tokens, self.lr, self.global_batch_size, [*words, *self.overrides])

    def check_one_step(self, key: str, max_seq_len: int) -> None:
        """Raises ConfigError for less to train on than one step takes; see `HealConfig`."""
        self.training().check_one_step(key, max_seq_len)


@dataclass
class AutoConfig:
    """Tries recipes on this machine and keeps the fastest that is good enough (target=cpu).

    Attributes:
        max_perplexity_ratio: Largest ratio of a child's perplexity to the parent's.
    """

    max_perplexity_ratio: float = setting(1.02, above=0, fix="use 1.02")
    quantizes: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True


# Steps that work on a block after another, and those that need the whole model.
BlockStep = RoundConfig | GptqConfig | AwqConfig | SmoothQuantConfig | MixedConfig | PruneConfig
ModelStep = StructuredPruneConfig | HealConfig | QatConfig | AutoConfig
Step = BlockStep | ModelStep
