"""More bits where few cost most."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.artifact import read_report
from compression.grid import fit_grid
from compression.mixed import choose_schemes, measure_kl, parts_of, shapes_of
from compression.recipe import MixedConfig
from compression.scheme import Scheme
from compression.source import choose_layers
from compression.stream import BlockStream
from monitoring.errors import ConfigError

INT2 = Scheme(bits=2, group_size=32)


def measured(parent, folder, num_samples=3):
    stream = BlockStream(parent)
    layers = choose_layers(stream, ["*"], [])
    ids = torch.randint(300, (num_samples, 16), generator=torch.Generator().manual_seed(0))
    kl = measure_kl(stream, layers, INT2, torch.float32, ids, folder, lambda done, total: None)
    return layers, ids, kl


@torch.no_grad()
def test_the_kl_is_that_of_the_whole_model_with_one_part_rounded(parent, tmp_path):
    layers, ids, kl = measured(parent, tmp_path)
    assert len(kl) == 6  # attention and MLP of three blocks
    model = AutoModelForCausalLM.from_pretrained(parent).eval()
    log_p = model(ids).logits.log_softmax(-1)
    part = "model.layers.1.self_attn"
    for name in parts_of(layers)[part]:
        layer = model.get_submodule(name)
        layer.weight.data = (
            fit_grid(layer.weight, INT2, torch.float32).quantize(layer.weight).dequantize()
        )
    log_q = model(ids).logits.log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert kl[part] == pytest.approx(float(wanted), rel=1e-4)


def test_the_budget_goes_to_the_parts_that_pay_most(parent):
    stream = BlockStream(parent)
    layers = choose_layers(stream, ["*"], [])
    shapes = shapes_of(stream, layers)
    kl = dict.fromkeys(parts_of(layers), 0.1)
    kl["model.layers.2.mlp"], kl["model.layers.0.self_attn"] = 5.0, 2.0
    step = MixedConfig(group_size=32, budget_bits=6.0)
    chosen = choose_schemes(step, "recipe.mixed", kl, shapes, 2)
    bits = {part: {chosen[name].bits for name in names} for part, names in parts_of(layers).items()}
    assert bits["model.layers.2.mlp"] == bits["model.layers.0.self_attn"] == {8}
    assert {8} != bits["model.layers.1.mlp"]
    total = sum(chosen[name].bytes_of(*shape, 2) for name, shape in shapes.items())
    num_weights = sum(outputs * inputs for outputs, inputs in shapes.values())
    assert 5.0 < 8 * total / num_weights <= 6.0


def test_a_budget_in_megabytes(parent):
    stream = BlockStream(parent)
    layers = choose_layers(stream, ["*"], [])
    shapes = shapes_of(stream, layers)
    kl = dict.fromkeys(parts_of(layers), 0.1)
    step = MixedConfig(group_size=32, budget_bits=None, budget_mb=0.06)
    chosen = choose_schemes(step, "recipe.mixed", kl, shapes, 2)
    total = sum(chosen[name].bytes_of(*shape, 2) for name, shape in shapes.items())
    assert 0.05e6 < total <= 0.06e6
    with pytest.raises(ConfigError, match=r"budget_mb=0.01: 4 bits everywhere.*take 0.0"):
        choose_schemes(
            MixedConfig(group_size=32, budget_bits=None, budget_mb=0.01), "x", kl, shapes, 2
        )


def test_the_command(compress, parent, tmp_path):
    words = [
        f"model={parent}",
        "recipe=mixed",
        "recipe.mixed.group_size=32",
        "recipe.mixed.budget_bits=6",
        "out=x",
        "evaluation.speed=false",
    ]
    code, _, err = compress(*words, "recipe.mixed.budget_bits=4")
    assert code == 2 and "4 bits everywhere, with their scales, take 4.5; raise it" in err
    assert not (tmp_path / "x").exists()
    code, _, err = compress(*words, "recipe.mixed.budget_mb=1")
    assert code == 2 and "exactly one of budget_bits and budget_mb" in err
    code, _, err = compress(*words)
    assert code == 0, err
    report = read_report(tmp_path / "x" / "compressed_tensors")
    assert {part["bits"] for part in report["stages"]["mixed"].values()} == {4, 8}
    assert report["reloaded_snr_db"] > 20
