"""The steps of a recipe, as a user configures them. Imports no torch, since `--help` reads them.

`build()` imports the method of a step; nothing else maps a step to its method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

from compression.scheme import Activation, Number, Scheme
from compression.sparsity import Criterion, Pattern
from core.errors import ConfigError
from core.settings.rules import setting

if TYPE_CHECKING:
    from compression.block import Block


class Method(Protocol):
    """A compression method, which is applied to one decoder block after another.

    Attributes:
        needs_data: True if the method needs the inputs of the block.
    """

    @property
    def needs_data(self) -> bool: ...

    def apply(self, block: Block) -> None:
        """Changes the block's layers in place."""
        ...


# Constraints of fields that several steps have.
_bits = partial(setting, least=2, most=8, fix="use 4 or 8")
_group_size = partial(setting, above=0, fix="use 128, or null for a scale a row")
_damping = partial(setting, above=0, below=1, fix="use 0.01")
_of_training = partial(setting, above=0, below=math.inf, fix="give more")


def _check_width(key: str, value: float) -> None:
    # From 1 on it is a size: the share 1 would remove everything.
    if not (0 <= value < 1 or (value >= 1 and value == int(value))):
        rule = "must be a share (from 0 to below 1) or a whole number (from 1 on)"
        raise ConfigError(key, value, rule, "0.25 removes a quarter")


@dataclass
class StepConfig:
    """Fields that every quantizing step has.

    Attributes:
        bits: Bits of a weight.
        group_size: Number of consecutive inputs that share a scale; null: all inputs of a row.
        symmetric: Stores no zero points, which every engine can read.
    """

    bits: int = _bits(8)
    group_size: int | None = _group_size(None)
    symmetric: bool = True
    quantizes: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    def scheme(self) -> Scheme:
        """Returns the scheme of a weight."""
        return Scheme(Number.int, self.bits, self.group_size, self.symmetric)


@dataclass
class RoundConfig(StepConfig):
    """Round to nearest; needs no data.

    Attributes:
        number: Number format of the codes: `int`, or `float8` (e4m3).
        activation: Number format to which a layer's input is rounded when the model runs.
    """

    number: Number = Number.int
    activation: Activation = Activation.none
    needs_data: ClassVar[bool] = False

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for float8 with settings that only integers have."""
        is_plain = self.bits == 8 and self.symmetric and self.group_size is None
        if self.number is Number.float8 and not is_plain:
            rule = "float8 has 8 bits, no zero point and a scale a row"
            raise ConfigError(f"{key}.number", "float8", rule, "leave out bits and group_size")

    def scheme(self) -> Scheme:
        return Scheme(self.number, self.bits, self.group_size, self.symmetric, self.activation)

    def build(self) -> Method:
        """Returns the method that the step configures."""
        from compression.methods.rounding import RoundToNearest

        return RoundToNearest(self.scheme())


@dataclass
class GptqConfig(StepConfig):
    """GPTQ: later weights compensate for rounding errors.

    Attributes:
        damping: Share of the mean squared input that is added to that of each input.
    """

    bits: int = _bits(4)
    group_size: int | None = _group_size(128)
    damping: float = _damping(0.01)

    def build(self) -> Method:
        """Returns the method that the step configures."""
        from compression.methods.gptq import Gptq

        return Gptq(self.scheme(), self.damping)


@dataclass
class AwqConfig(StepConfig):
    """AWQ: inputs are scaled so that important weights round well."""

    bits: int = _bits(4)
    group_size: int | None = _group_size(128)

    def build(self) -> Method:
        """Returns the method that the step configures."""
        from compression.methods.equalizing import Awq

        return Awq(self.scheme())


@dataclass
class MixedConfig(StepConfig):
    """Few bits for most layers and more for sensitive ones, by GPTQ, by measured KL in a budget.

    Attributes:
        bits: Bits of a weight in most layers.
        high_bits: Bits of a weight in sensitive layers.
        group_size: Number of consecutive inputs that share a scale, for both; null: all of a row.
        budget_bits: Mean number of bits of a weight, including scales: one of three budgets.
        budget_mb: Megabytes of all quantized weights, including scales: one of three budgets.
        budget_tokens_per_s: Decoding speed on this machine as `evaluation` times it, with the
            kernels of the target: one of three budgets.
        samples: Number of calibration samples on which the KL is measured.
        damping: Share of the mean squared input that is added to that of each input.
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
        """Raises ConfigError unless high_bits is above bits, and there is one budget."""
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
            rule = "exactly one of budget_bits, budget_mb and budget_tokens_per_s must be set"
            fix = f"set one of them, and {key}.budget_bits=null if it is another"
            raise ConfigError(f"{key}.{name}", budgets[name], rule, fix)

    def schemes(self) -> tuple[Scheme, Scheme]:
        """Returns the scheme of few bits, and the one of more bits."""
        high = Scheme(Number.int, self.high_bits, self.group_size, self.symmetric)
        return self.scheme(), high

    def build(self) -> Method:
        """Returns the method before the layers with more bits are chosen."""
        from compression.methods.gptq import Gptq

        return Gptq(self.scheme(), self.damping)


@dataclass
class SmoothQuantConfig(StepConfig):
    """SmoothQuant: int8 weights and int8 inputs, with outliers moved from inputs into weights.

    Attributes:
        migration: Share of an outlier that moves from inputs into weights, from 0 to 1.
    """

    migration: float = setting(0.5, least=0, most=1, fix="use 0.5")

    def scheme(self) -> Scheme:
        return Scheme(Number.int, self.bits, self.group_size, self.symmetric, Activation.int8)

    def build(self) -> Method:
        """Returns the method that the step configures."""
        from compression.methods.equalizing import SmoothQuant

        return SmoothQuant(self.scheme(), self.migration)


@dataclass
class PruneConfig:
    """Sets weights to zero; the model keeps its shape, and common kernels become no faster.

    Attributes:
        criterion: Rule by which weights are chosen.
        sparsity: Share of each layer's weights that become zero; 0.5 for two_of_four,
            four_of_eight.
        pattern: Positions at which zeros may be.
        damping: Share of the mean squared input that is added to that of each input, for sparsegpt.
    """

    criterion: Criterion = Criterion.wanda
    sparsity: float = setting(0.5, above=0, below=1, fix="use 0.5")
    pattern: Pattern = Pattern.unstructured
    damping: float = _damping(0.01)
    quantizes: ClassVar[bool] = False

    def cross_check(self, key: str) -> None:
        """Raises ConfigError if the pattern and the sparsity contradict each other."""
        if self.pattern is not Pattern.unstructured and self.sparsity != 0.5:
            rule = f"the pattern {self.pattern.value} prunes exactly half"
            raise ConfigError(f"{key}.sparsity", self.sparsity, rule, "use 0.5")

    @property
    def needs_data(self) -> bool:
        """True if the criterion needs the layers' inputs."""
        return self.criterion is not Criterion.magnitude

    def build(self) -> Method:
        """Returns the method that the step configures."""
        from compression.methods.pruning import Prune

        return Prune(self.criterion, self.sparsity, self.pattern, self.damping)


@dataclass
class HealConfig:
    """Trains a pruned model towards its parent with the trainer; pruned weights stay zero.

    Attributes:
        tokens: Number of tokens to train on.
        lr: Largest learning rate.
        global_batch_size: Number of samples in a step.
        overrides: More words for the trainer's command line, such as `parallel=fsdp` or `nproc=8`.
    """

    tokens: int = _of_training(2_000_000)
    lr: float = _of_training(1e-4)
    global_batch_size: int = _of_training(16)
    overrides: list[str] = field(default_factory=list)
    quantizes: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False  # the trainer reads its data itself

    def check_one_step(self, key: str, max_seq_len: int) -> None:
        """Raises ConfigError if `tokens` are fewer than one training step takes.

        Args:
            key: Key of the step in the recipe, for errors.
            max_seq_len: Number of tokens of a sample.
        """
        least = self.global_batch_size * max_seq_len
        if self.tokens < least:
            rule = f"one step takes {least}: {self.global_batch_size} samples of {max_seq_len}"
            fix = f"raise it, or lower {key}.global_batch_size or data.max_seq_len"
            raise ConfigError(f"{key}.tokens", self.tokens, rule, fix)


@dataclass
class StructuredPruneConfig:
    """Makes the model itself smaller; the result is an ordinary Hugging Face model.

    Each width is given as the share that is removed (below 1), or as the size that stays (from 1
    on); or `params` chooses all widths.

    Attributes:
        heads: Key-value heads, each with the query heads that share it.
        mlp: Width of the MLPs (`intermediate_size`).
        hidden: Channels of the residual stream (`hidden_size`).
        depth: Decoder blocks.
        params: Share of all parameters that is removed, including embeddings and head; null: the
            widths above say what is removed.
        multiple_of: Number of which `mlp` and `hidden` become a multiple if they are given as
            shares.
        refit: Fits the remaining `o_proj` and `down_proj` to the parent's residual stream.
        damping: Share of the mean squared input that holds a refit close to the original weights; a
            smaller share overfits to the calibration text.
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
        """Raises ConfigError for widths that are given beside `params`, which chooses them."""
        if self.params is None:
            return
        for name in ("heads", "mlp", "hidden", "depth"):
            if value := getattr(self, name):
                fix = f"set {key}.params=null, or leave {name} out"
                raise ConfigError(f"{key}.{name}", value, "contradicts params", fix)


@dataclass
class QatConfig:
    """Trains towards the parent with weights that are rounded in forward, then rounds them.

    Attributes:
        bits: Bits of a weight.
        group_size: Number of consecutive inputs that share a scale; null: all of a row.
        tokens: Number of tokens to train on.
        lr: Largest learning rate.
        global_batch_size: Number of samples in a step.
        overrides: More words for the trainer's command line.
    """

    bits: int = _bits(4)
    group_size: int | None = _group_size(128)
    tokens: int = _of_training(2_000_000)
    lr: float = _of_training(2e-5)
    global_batch_size: int = _of_training(16)
    overrides: list[str] = field(default_factory=list)
    quantizes: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False  # the trainer reads its data itself

    def rounding(self) -> RoundConfig:
        """Returns the step that rounds the trained weights in the same way as in forward."""
        return RoundConfig(bits=self.bits, group_size=self.group_size)

    def scheme(self) -> Scheme:
        """Returns the scheme of a weight."""
        return self.rounding().scheme()

    def training(self, scale_dtype: str = "bfloat16") -> HealConfig:
        """Returns the training run of the step.

        Args:
            scale_dtype: Type of scales, by torch's name.
        """
        words = [f"fake_quant.bits={self.bits}", f"fake_quant.scale_dtype={scale_dtype}"]
        if self.group_size is not None:
            words.append(f"fake_quant.group_size={self.group_size}")
        return HealConfig(self.tokens, self.lr, self.global_batch_size, [*words, *self.overrides])

    def check_one_step(self, key: str, max_seq_len: int) -> None:
        """Raises ConfigError if `tokens` are fewer than one step takes; see `HealConfig`."""
        self.training().check_one_step(key, max_seq_len)


@dataclass
class AutoConfig:
    """Tries recipes on this machine and keeps the fastest one of good quality (target=cpu).

    Attributes:
        max_perplexity_ratio: Largest allowed ratio of a child's perplexity to the parent's.
    """

    max_perplexity_ratio: float = setting(1.02, above=0, fix="use 1.02")
    quantizes: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True


# Steps that are applied block by block, and steps that need the whole model.
BlockStep = RoundConfig | GptqConfig | AwqConfig | SmoothQuantConfig | MixedConfig | PruneConfig
ModelStep = StructuredPruneConfig | HealConfig | QatConfig | AutoConfig
Step = BlockStep | ModelStep
