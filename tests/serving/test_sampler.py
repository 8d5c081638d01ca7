"""Tokens are drawn by each request's own settings."""

import torch

from serving.engines.sampler import draw


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    scores = torch.randn(1, 12).expand(20_000, 12)
    ones = torch.ones(20_000, dtype=torch.float64)
    found = draw(scores, 0.7 * ones, ones, torch.rand(20_000, dtype=torch.float64))
    shares = torch.bincount(found, minlength=12) / 20_000
    wanted = (scores[0] / 0.7).softmax(-1)
    assert (shares - wanted).abs().max() < 0.012  # over three standard deviations


def test_top_p_keeps_the_likeliest_that_have_it_together():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    uniforms = torch.linspace(0, 0.9999, 200, dtype=torch.float64)
    for top_p, kept in ((1.0, 4), (0.95, 4), (0.9, 3), (0.71, 3), (0.7, 2), (0.4, 1), (1e-3, 1)):
        ones = torch.ones(200, dtype=torch.float64)
        # The float32 logarithms' sums are a little off: just below.
        found = draw(scores.expand(200, 4), ones, (top_p - 1e-6) * ones, uniforms)
        assert found.unique().tolist() == list(range(kept))


def test_extremes():
    ones = torch.ones(1, dtype=torch.float64)
    scores = torch.tensor([[1e4, -1e4, float("-inf")]])
    assert draw(scores, 1e-9 * ones, ones, 0.999999 * ones).item() == 0
    assert draw(scores, 2 * ones, ones, (1 - 2**-53) * ones).item() == 0
    assert draw(torch.zeros(1, 3), ones, ones, (1 - 2**-53) * ones).item() == 2
