"""Codes, scales and zero points."""

import pytest
import torch

from compression.methods.clipping import clipped_grid
from compression.quantizer import FLOAT8, fit_grid, round_activation
from compression.recipe import RoundConfig
from compression.scheme import Activation, Number, Scheme
from core.errors import ConfigError
from core.settings.rules import check_settings


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_is_at_most_half_a_step(bits, group_size, symmetric):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    grid = fit_grid(weight, scheme, torch.float32)
    quantized = grid.quantize(weight)
    step = grid.scales.repeat_interleave(64 // grid.scales.shape[1], 1)
    # Zero points are rounded, so that one end may lose another half step.
    most = 0.5 if symmetric else 1.0
    assert ((quantized.dequantize() - weight).abs() <= most * step * (1 + 1e-4)).all()
    assert quantized.codes.dtype == torch.int8
    assert int(quantized.codes.max()) < 2 ** (bits - 1)
    assert int(quantized.codes.min()) >= -(2 ** (bits - 1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_stays_zero(symmetric):
    weight = torch.rand(4, 32) + 1.0  # all on one side
    weight[:, ::2] = 0.0
    scheme = Scheme(bits=4, group_size=8, symmetric=symmetric)
    restored = fit_grid(weight, scheme, torch.bfloat16).quantize(weight).dequantize()
    assert (restored[:, ::2] == 0).all() and (restored[:, 1::2] != 0).all()


def test_an_asymmetric_grid_is_finer_where_weights_are_on_one_side():
    weight = torch.rand(4, 32)

    def error(symmetric):
        scheme = Scheme(bits=4, symmetric=symmetric)
        return (
            fit_grid(weight, scheme, torch.float32).quantize(weight).dequantize() - weight
        ).norm()

    assert error(False) < 0.7 * error(True)


def test_scales_are_values_of_the_artifacts_type():
    grid = fit_grid(torch.randn(8, 64), Scheme(bits=4, group_size=16), torch.bfloat16)
    assert torch.equal(grid.scales, grid.scales.bfloat16().float())


def test_a_group_of_zeros_has_codes():
    quantized = fit_grid(torch.zeros(2, 8), Scheme(bits=4), torch.bfloat16).quantize(
        torch.zeros(2, 8)
    )
    assert (quantized.dequantize() == 0).all()


def test_float8_keeps_relative_precision():
    weight = torch.randn(4, 64)
    quantized = fit_grid(weight, Scheme(Number.float8), torch.float32).quantize(weight)
    assert quantized.codes.dtype == FLOAT8
    large = weight.abs() > 0.1
    assert ((quantized.dequantize() - weight).abs()[large] <= weight.abs()[large] / 15).all()


def test_clipping_lowers_the_weighted_error():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    weight[:, 5] *= 6  # outliers, whose inputs matter little
    importance = torch.ones(64)
    importance[5] = 1e-3
    scheme = Scheme(bits=3, group_size=32)

    def error(grid):
        return float(((grid.quantize(weight).dequantize() - weight) ** 2 * importance).sum())

    plain = fit_grid(weight, scheme, torch.float32)
    clipped = clipped_grid(weight, importance, scheme, torch.float32)
    assert error(clipped) < 0.8 * error(plain)


def test_activations_are_rounded_by_token():
    x = torch.randn(2, 3, 16) * torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    for activation, most in ((Activation.int8, 1 / 200), (Activation.float8, 1 / 15)):
        error = (round_activation(x, activation) - x).abs().amax(-1)
        assert (error <= most * x.abs().amax(-1)).all() and (error > 0).all()
    assert round_activation(x, Activation.none) is x


@pytest.mark.parametrize(
    "step",
    [
        RoundConfig(bits=9),
        RoundConfig(bits=1),
        RoundConfig(group_size=0),
        RoundConfig(number=Number.float8, bits=4),
    ],
)
def test_schemes_that_are_none(step):
    with pytest.raises(ConfigError, match="recipe.x"):
        check_settings(step, "recipe.x")


def test_a_scheme_survives_being_written_down():
    scheme = Scheme(bits=4, group_size=32, symmetric=False, activation=Activation.int8)
    assert Scheme.parse(scheme.describe()) == scheme
