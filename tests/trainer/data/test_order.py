import sys

import numpy as np
import pytest

from core.errors import ConfigError
from trainer.data.order import BLOCK, OrderRule, Permutation, SampleOrder


def block_of(order):
    """Samples of each source in the first block."""
    return np.bincount(order(0, BLOCK)[0]).tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 1024, 4097, 100_003])
def test_a_permutation_is_a_bijection(n):
    for epoch in range(3):
        image = Permutation(n, seed=5, epoch=epoch)(np.arange(n))
        assert sorted(image.tolist()) == list(range(n))


def test_permutations_differ_between_seeds_and_epochs_and_from_the_identity():
    everyone = np.arange(1000)
    images = [Permutation(1000, seed, epoch)(everyone) for seed in range(3) for epoch in range(3)]
    for number, image in enumerate([everyone, *images]):
        for other in images[number:]:
            assert (image == other).sum() < 15  # 1 expected by chance


def test_a_permutation_has_no_preferred_places():
    images = np.array([Permutation(10, 0, epoch)(np.arange(10)) for epoch in range(5000)])
    counts = np.array([np.bincount(column, minlength=10) for column in images.T])
    assert abs(counts - 500).max() < 110  # 5 standard deviations


def test_a_permutation_of_a_petascale_number_of_samples_stays_inside():
    n = (1 << 40) + 1
    image = Permutation(n, 1, 2)(np.array([0, 1, 2, n - 1]))
    assert len(set(image.tolist())) == 4 and (0 <= image).all() and (image < n).all()


def test_the_order_never_changes():
    """Golden: if this fails, runs would resume on other samples. Do not update; fix the code."""
    assert Permutation(10, 0, 0)(np.arange(10)).tolist() == GOLDEN_SMALL
    assert Permutation(10**12, 42, 7)(np.arange(4)).tolist() == GOLDEN_LARGE
    single = SampleOrder([1000], [1.0], seed=1)
    assert single(2998, 5)[1].tolist() == GOLDEN_SINGLE
    sources, samples = SampleOrder([1000, 50, 7], [0.6, 0.3, 0.1], seed=3)(123_456, 8)
    assert list(zip(sources.tolist(), samples.tolist(), strict=True)) == GOLDEN_MIXTURE


GOLDEN_SMALL = [2, 4, 1, 0, 3, 9, 7, 6, 8, 5]
GOLDEN_LARGE = [808228569163, 109754820424, 780433316692, 583298279041]
GOLDEN_SINGLE = [259, 27, 936, 678, 591]
GOLDEN_MIXTURE = [(1, 10), (0, 991), (0, 619), (1, 15), (0, 285), (1, 0), (0, 103), (1, 2)]


# Of weights of which every rule makes other counts in a block, and what comes at 123,000.
GOLDEN_RULES = {
    "exact": ([214, 725, 85], [(1, 35), (2, 0), (1, 37), (1, 20), (0, 719)]),
    "left-to-right": ([213, 725, 86], [(1, 35), (2, 1), (1, 37), (1, 20), (0, 723)]),
    "compensated": ([213, 726, 85], [(1, 2), (2, 0), (1, 43), (1, 23), (0, 723)]),
}


@pytest.mark.parametrize("rule", OrderRule)
def test_each_rule_keeps_its_order_on_every_python(rule):
    """Golden, as above: a run goes on with its own rule, whatever Python it meets."""
    order = SampleOrder([1000, 50, 7], [0.25, 0.85, 0.1], seed=3, rule=rule)
    sources, samples = order(123_000, 5)
    there = list(zip(sources.tolist(), samples.tolist(), strict=True))
    assert (block_of(order), there) == GOLDEN_RULES[rule.value]


@pytest.mark.parametrize("weights", [[0.25, 0.85, 0.1], [0.6, 0.3, 0.1], [0.05, 0.65, 0.2, 0.3]])
def test_runs_from_before_rules_had_names_added_with_the_sum_of_their_python(weights):
    rule = OrderRule.left_to_right if sys.version_info < (3, 12) else OrderRule.compensated
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: BLOCK - sum(counts)]:
        counts[index] += 1
    assert block_of(SampleOrder([9] * len(weights), weights, seed=0, rule=rule)) == counts


def test_weights_are_the_decimals_that_were_written():
    """6 : 3 : 1, in whichever unit: no rounding may decide between equal remainders."""
    written = ([0.6, 0.3, 0.1], [6.0, 3.0, 1.0], [6e-7, 3e-7, 1e-7])
    counts = [block_of(SampleOrder([9] * 3, weights, seed=0)) for weights in written]
    assert counts == [[615, 307, 102]] * 3  # 614.4, 307.2, 102.4: the tie is the earlier source's


@pytest.mark.parametrize("sizes, weights", [([37], [1.0]), ([100, 37, 5], [3.0, 2.0, 0.5])])
def test_seeking_equals_reading_from_the_start(sizes, weights):
    order = SampleOrder(sizes, weights, seed=9)
    whole = np.stack(order(0, 5000))
    for first in (0, 1, 36, 37, 1023, 1024, 3333):
        assert (np.stack(order(first, 1500)) == whole[:, first : first + 1500]).all()
    assert order(5, 0)[0].shape == (0,)


def test_each_epoch_of_each_source_visits_every_sample_once():
    sizes = [100, 37, 5]
    sources, samples = SampleOrder(sizes, [3.0, 2.0, 0.5], seed=9)(0, 20_000)
    for source, size in enumerate(sizes):
        drawn = samples[sources == source]
        epochs = [drawn[start : start + size] for start in range(0, len(drawn) - size, size)]
        assert all(sorted(epoch.tolist()) == list(range(size)) for epoch in epochs)
        assert size == 5 or len({epoch.tobytes() for epoch in epochs}) == len(epochs)


def test_a_mixture_keeps_its_proportions_in_every_block():
    sources, _ = SampleOrder([10, 10, 10], [0.5, 0.3, 0.2], seed=0)(0, 50 * BLOCK)
    for block in sources.reshape(-1, BLOCK):
        assert np.bincount(block).tolist() == [512, 307, 205]
    ahead = sources[:BLOCK].reshape(4, -1)  # mixed inside a block too
    assert all(np.bincount(part, minlength=3).min() > 20 for part in ahead)


def test_a_weight_that_is_never_drawn_is_refused():
    with pytest.raises(ConfigError, match=r"data\.sources\.rare\.weight=0\.0001"):
        SampleOrder([10, 10], [1.0, 0.0001], seed=0, names=["web", "rare"])


def test_seeking_far_ahead_takes_no_more_work_than_reading_from_the_start(monkeypatch):
    permuted, network = [], Permutation._network

    def counted(self, words):
        permuted.append(len(words))
        return network(self, words)

    monkeypatch.setattr(Permutation, "_network", counted)
    order = SampleOrder([10**9, 12_345, 7], [0.5, 0.3, 0.2], seed=3)
    order(0, 512)
    at_the_start = sum(permuted)
    order(10_000_000 * BLOCK, 512)
    assert sum(permuted) < 4 * at_the_start
