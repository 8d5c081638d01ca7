"""Determines the sample at each position of an endless stream: seekable, and stable for ever.

It uses only integers and fractions, and no NumPy generator, since NumPy does not promise that its
permutations never change: a run that resumes after an upgrade must see the samples that it would
have seen. For the same reason a run keeps the `OrderRule` that it began with.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

BLOCK = 1024  # number of positions in which a mixture keeps its proportions exactly
ROUNDS = 8  # of the Feistel network; another number would change the order of every run


class OrderRule(StrEnum):
    """Lists the rules that turn weights of a mixture into numbers of samples.

    Earlier versions added the weights with the built-in `sum`, which rounds differently from Python
    3.12 on: weights 0.6, 0.3 and 0.1 made 615, 307 and 102 samples of a block before, and 614, 307
    and 103 since. Checkpoints store the rule.

    Attributes:
        exact: Weights are the decimals that the user wrote, and nothing is rounded.
        left_to_right: Floats are added one after another, like `sum` of Python 3.11.
        compensated: Floats are added with Neumaier's correction, like `sum` of Python 3.12 and
            later.
    """

    exact = "exact"
    left_to_right = "left-to-right"
    compensated = "compensated"


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, SplitMix64's increment


def mix(*values: int) -> int:
    """Returns a 64-bit hash of integers by SplitMix64's finalizer (Steele et al., 2014)."""
    state = 0
    for value in values:
        state = (state + (value & _MASK) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _mix_words(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Permutation:
    """Is a pseudo-random bijection on [0, n) that needs no table.

    A Feistel network permutes the next power of four. A result outside of [0, n) is sent through it
    again until it is inside ("cycle walking", Black and Rogaway, 2002).

    Args:
        n: Size, from 1 to 2**62.
        seed: Any integer.
        epoch: Number that selects one of the seed's permutations.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        assert 1 <= n <= 1 << 62, n
        self.n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._keys = [np.uint64(mix(seed, epoch, number)) for number in range(ROUNDS)]

    def __call__(self, indices: Indices) -> Indices:
        """Returns the image of each index: (count,) in [0, n) -> (count,) in [0, n)."""
        words = self._network(indices.astype(np.uint64))
        outside = np.flatnonzero(words >= self.n)
        # The walk ends, since a bijection leads back to the start, which is inside.
        while len(outside):
            walked = self._network(words[outside])
            words[outside] = walked
            outside = outside[walked >= self.n]
        return words.astype(np.int64)

    def _network(self, words: Words) -> Words:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = words >> bits, words & mask
        for key in self._keys:
            left, right = right, left ^ (_mix_words(right + key) & mask)
        return (left << bits) | right


class SampleOrder:
    """Yields the endless stream of samples of one source or of a mixture.

    Each source is read epoch after epoch, with every sample once per epoch and another order in
    each. In a mixture every block of 1024 positions contains each source in proportion to its
    weight (largest remainder), shuffled.

    Args:
        sizes: Number of samples in each source, at least 1.
        weights: Share of each source, positive; only their proportions count.
        seed: Seed that determines everything else.
        names: Names of the sources, for messages.
        rule: Rule by which weights are counted; it affects mixtures only.

    Raises:
        ConfigError: A weight is too small for one sample in a block.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        names: Sequence[str] | None = None,
        rule: OrderRule = OrderRule.exact,
    ) -> None:
        assert len(sizes) == len(weights) >= 1 and min(sizes) >= 1, (sizes, weights)
        self._sizes, self._seed = list(sizes), seed
        self._counts = _largest_remainder(_shares(weights, rule))
        for index, count in enumerate(self._counts):
            if count == 0:
                name = names[index] if names else str(index)
                raise ConfigError(
                    f"data.sources.{name}.weight",
                    weights[index],
                    f"is less than one sample in {BLOCK} of the mixture",
                    "raise it or remove the source",
                )

    def __call__(self, first: int, count: int) -> tuple[Indices, Indices]:
        """Returns positions [first, first + count) of the stream.

        Returns:
            Index of the source and index of the sample in it, both (count,) int64.
        """
        if len(self._sizes) == 1:
            sources = np.zeros(count, np.int64)
            draws = np.arange(first, first + count)
        else:
            sources, draws = self._mixture(first, count)
        samples = np.empty(count, np.int64)
        for source in np.unique(sources):
            here = sources == source
            samples[here] = self._samples(int(source), draws[here])
        return sources, samples

    def _mixture(self, first: int, count: int) -> tuple[Indices, Indices]:
        """Returns the source at each position, and the number of samples drawn from it before."""
        first_block, last_block = first // BLOCK, (first + count - 1) // BLOCK
        blocks = [self._block(block) for block in range(first_block, last_block + 1)]
        inside = slice(first - first_block * BLOCK, first - first_block * BLOCK + count)
        sources = np.concatenate([block[0] for block in blocks] or [np.empty(0, np.int64)])
        draws = np.concatenate([block[1] for block in blocks] or [np.empty(0, np.int64)])
        return sources[inside], draws[inside]

    def _block(self, block: int) -> tuple[Indices, Indices]:
        # Epoch -1 of the seed is not used by any source, so blocks are shuffled independently.
        slots = Permutation(BLOCK, mix(self._seed, -1), block)(np.arange(BLOCK))
        ends = np.cumsum(self._counts)
        sources = np.searchsorted(ends, slots, side="right").astype(np.int64)
        draws = np.empty(BLOCK, np.int64)
        for source, count in enumerate(self._counts):
            draws[sources == source] = block * count + np.arange(count)
        return sources, draws

    def _samples(self, source: int, draws: Indices) -> Indices:
        size = self._sizes[source]
        epochs, indices = np.divmod(draws, size)
        samples = np.empty(len(draws), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            permutation = Permutation(size, mix(self._seed, source), int(epoch))
            samples[here] = permutation(indices[here])
        return samples


def _shares(weights: Sequence[float], rule: OrderRule) -> Sequence[Fraction | float]:
    """Returns the exact share of BLOCK samples for each source, not yet an integer."""
    if rule is OrderRule.exact:
        # repr gives the shortest decimal of a float, which is what the user wrote.
        decimals = [Fraction(repr(float(weight))) for weight in weights]
        total = sum(decimals)
        return [weight / total * BLOCK for weight in decimals]
    add = _left_to_right if rule is OrderRule.left_to_right else _compensated
    rounded = add(weights)
    return [weight / rounded * BLOCK for weight in weights]


def _largest_remainder(shares: Sequence[Fraction | float]) -> list[int]:
    """Returns the number of BLOCK samples for each source; ties go to the earlier source."""
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for index in by_remainder[: BLOCK - sum(counts)]:
        counts[index] += 1
    return counts


def _left_to_right(values: Iterable[float]) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


def _compensated(values: Iterable[float]) -> float:
    """Returns what `sum` of CPython 3.12 returns (Neumaier, 1974; `builtin_sum_impl`)."""
    total = lost = 0.0
    for value in values:
        added = total + value
        if abs(total) >= abs(value):
            lost += (total - added) + value
        else:
            lost += (value - added) + total
        total = added
    return total + lost
