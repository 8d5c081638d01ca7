"""What methods do to a block."""

from dataclasses import replace

import pytest
import torch

from compression.block import output_error, watch_inputs
from compression.methods.equalizing import Awq, SmoothQuant, _fold
from compression.methods.gptq import Gptq, gptq_codes
from compression.methods.pruning import Prune
from compression.methods.rounding import RoundToNearest
from compression.quantizer import Grid, fit_grid
from compression.scheme import Activation, Scheme
from compression.sparsity import Criterion, Pattern
from tests.compression.blocks import error_after, outputs, take_block
from tests.compression.conftest import save_model

INT4 = Scheme(bits=4, group_size=32)
INT3 = Scheme(bits=3, group_size=32)


def test_what_flows_into_layers_is_gathered_once_for_those_that_share_it(parent):
    block = take_block(parent)
    found = watch_inputs(block)
    parts = [{name.rpartition(".")[2] for name in inputs.names} for inputs in found]
    assert parts == [
        {"q_proj", "k_proj", "v_proj"},
        {"o_proj"},
        {"gate_proj", "up_proj"},
        {"down_proj"},
    ]
    assert [inputs.feeder for inputs in found] == [
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    ]
    seen = []
    block.layers["model.layers.0.mlp.down_proj"].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    outputs(block)
    x = torch.cat(seen)
    torch.testing.assert_close(found[3].gram, x.T @ x / len(x))
    torch.testing.assert_close(found[3].largest, x.abs().amax(0))
    torch.testing.assert_close(found[3].mean, x.abs().mean(0))


def test_better_methods_change_the_output_less(parent):
    rounding, _ = error_after(parent, RoundToNearest(INT3))
    gptq, _ = error_after(parent, Gptq(INT3, 0.01))
    awq, _ = error_after(parent, Awq(INT3))
    assert gptq < 0.6 * rounding
    assert awq < 0.9 * rounding


def test_gptq_is_exact_on_inputs_of_few_directions():
    """With inputs of rank one, all but one weight of a row can make up for the others."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.rand(32, generator=generator) + 0.5
    gram = torch.outer(direction, direction)
    weight = torch.randn(8, 32, generator=generator)
    grid = fit_grid(weight, Scheme(bits=4), torch.float32)
    codes = gptq_codes(weight, gram, grid, 1e-4)
    found = output_error(grid.of(codes).dequantize() - weight, gram)
    rounded = output_error(grid.quantize(weight).dequantize() - weight, gram)
    assert found < 0.05 * rounded


def test_gptq_keeps_zeros_and_stays_on_the_grid(parent):
    block = take_block(parent)
    Prune(Criterion.wanda, 0.5, Pattern.two_of_four, 0.01).apply(block)
    masks = {name: layer.weight == 0 for name, layer in block.layers.items()}
    Gptq(replace(INT4, symmetric=False), 0.01).apply(block)
    for name, quantized in block.quantized.items():
        assert (quantized.dequantize()[masks[name]] == 0).all()
        grid = Grid(quantized.scheme, quantized.scales, quantized.zero_points.float())
        assert torch.equal(grid.encode(quantized.dequantize()), quantized.codes)


def test_a_layer_that_gptq_makes_worse_is_rounded(parent, monkeypatch):
    def terrible(weight, gram, grid, damping):
        return torch.zeros_like(weight, dtype=torch.int8)

    monkeypatch.setattr("compression.methods.gptq.gptq_codes", terrible)
    error, block = error_after(parent, Gptq(INT4, 0.01))
    rounding, _ = error_after(parent, RoundToNearest(INT4))
    assert error == rounding
    assert {note["method"] for note in block.notes.values()} == {"rounding"}


def test_inputs_that_are_always_zero_do_no_harm(parent):
    block = take_block(parent)
    block.module.input_layernorm.weight.data[5] = 0.0
    before = outputs(block)
    Gptq(INT4, 0.01).apply(block)
    change = outputs(block) - before
    assert torch.isfinite(change).all() and change.norm() < 0.1 * before.norm()


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_scale_changes_nothing_where_it_is_folded(model_type, tmp_path):
    save_model(tmp_path, model_type, **({"head_dim": 16} if model_type == "qwen3" else {}))
    block = take_block(tmp_path, dtype=torch.bfloat16)
    before = outputs(block)
    folded = 0
    for inputs in watch_inputs(block):
        fold = _fold(block, inputs)
        if fold is not None:
            fold(torch.rand(len(inputs.mean)) + 0.5)
            folded += 1
    assert folded == 3  # both norms, and up_proj
    assert (outputs(block) - before).norm() < 1e-5 * before.norm()
    for norm in (block.module.input_layernorm, block.module.post_attention_layernorm):
        assert torch.equal(norm.weight, norm.weight.bfloat16().float())


def test_a_norm_that_adds_one_to_its_weight_takes_no_scale(tmp_path):
    save_model(tmp_path, "gemma2", head_dim=16, pad_token_id=0)
    block = take_block(tmp_path)
    folds = {
        inputs.names[0].rpartition(".")[2]: _fold(block, inputs) for inputs in watch_inputs(block)
    }
    assert folds["q_proj"] is None and folds["gate_proj"] is None
    assert folds["down_proj"] is not None  # up_proj is still a factor
    rounding, _ = error_after(tmp_path, RoundToNearest(INT3))
    awq, _ = error_after(tmp_path, Awq(INT3))
    assert awq < rounding


def test_smoothquant_moves_outliers_out_of_the_inputs(parent):
    block = take_block(parent)
    block.module.post_attention_layernorm.weight.data[3] *= 50.0
    flat = watch_inputs(block)[2].largest
    scheme = Scheme(activation=Activation.int8)
    SmoothQuant(scheme, 0.5).apply(block)
    smooth = watch_inputs(block)[2].largest
    assert smooth.max() / smooth.median() < 0.5 * flat.max() / flat.median()


@pytest.mark.parametrize("criterion", Criterion)
@pytest.mark.parametrize("pattern", Pattern)
def test_as_many_weights_go_as_were_asked_for(criterion, pattern, parent):
    _, block = error_after(parent, Prune(criterion, 0.5, pattern, 0.01))
    for layer in block.layers.values():
        zeros = layer.weight == 0
        assert abs(float(zeros.float().mean()) - 0.5) < 0.01
        if pattern is not Pattern.unstructured:
            kept, size = pattern.kept_of
            assert (zeros.unflatten(1, (-1, size)).sum(-1) == size - kept).all()


@pytest.mark.parametrize("pattern", Pattern)
def test_criteria_that_look_at_inputs_are_better(pattern, parent):
    errors = [
        error_after(parent, Prune(criterion, 0.5, pattern, 0.01))[0]
        for criterion in (Criterion.magnitude, Criterion.wanda, Criterion.sparsegpt)
    ]
    assert errors[0] > 1.1 * errors[1] > 1.1 * errors[2]


def test_another_share_than_half(parent):
    _, block = error_after(parent, Prune(Criterion.sparsegpt, 0.25, Pattern.unstructured, 0.01))
    for layer in block.layers.values():
        assert abs(float((layer.weight == 0).float().mean()) - 0.25) < 0.01
