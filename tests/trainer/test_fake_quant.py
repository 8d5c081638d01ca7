"""Weights that are rounded in forward, and learn to bear it."""

from dataclasses import replace

import pytest
import torch

from compression.quantizer import fit_grid
from compression.scheme import Scheme
from core.errors import ConfigError
from core.settings.rules import check_settings
from trainer.checkpoint import TrainerState
from trainer.command import TRAINER
from trainer.config import FakeQuantConfig, resolve
from trainer.fake_quant import fake_quantize, prepare_fake_quant
from trainer.model import build_meta_model
from trainer.model_config import NamedModelConfig
from trainer.resume import check_same_run

LLAMA = NamedModelConfig(
    model_type="llama",
    config=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_rounds_as_the_compression_will(bits, group_size, dtype):
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    grid = fit_grid(weight, Scheme(bits=bits, group_size=group_size), dtype)
    wanted = grid.quantize(weight).dequantize()
    torch.testing.assert_close(
        fake_quantize(weight, bits, group_size, dtype), wanted, rtol=1e-6, atol=1e-6
    )


def test_the_gradient_passes_straight_through():
    weight = torch.randn(4, 32, requires_grad=True)
    x = torch.randn(3, 32)
    (x @ fake_quantize(weight, 4, 16, torch.float32).T).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 32))


def test_layers_of_blocks_are_rounded_and_nothing_else():
    model = build_meta_model(LLAMA, 300).to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.model.rotary_emb.inv_freq.fill_(0.1)
    names = list(model.state_dict())
    ids = torch.randint(300, (1, 8))
    plain = model(ids).logits
    prepare_fake_quant(model, FakeQuantConfig(bits=4, group_size=16))
    rounded = model(ids).logits
    assert not torch.allclose(plain, rounded) and list(model.state_dict()) == names
    for block in model.model.layers:
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data = fake_quantize(layer.weight, 4, 16, torch.bfloat16)
                del layer.forward
    torch.testing.assert_close(model(ids).logits, rounded, rtol=1e-4, atol=1e-4)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="fake_quant.group_size=64: does not divide the 48"):
        prepare_fake_quant(build_meta_model(LLAMA, 300), FakeQuantConfig(bits=4, group_size=64))
    with pytest.raises(ConfigError, match="has no effect without fake_quant.bits"):
        check_settings(FakeQuantConfig(group_size=64), "fake_quant")
    with pytest.raises(ConfigError, match="fake_quant.bits=16"):
        check_settings(FakeQuantConfig(bits=16), "fake_quant")


def test_training_with_it_lowers_the_loss_and_is_told_apart(trainer, small, tmp_path):
    words = [*small, f"run.dir={tmp_path / 'run'}", "fake_quant.bits=4"]
    done = trainer(*words)
    assert done.code == 0, done.err
    done = trainer(*words, "fake_quant.bits=8", "stop.steps=100")
    assert done.code == 2 and "fake_quant" in done.err


def test_a_checkpoint_from_before_there_was_such_a_setting_goes_on():
    config = TRAINER.compose()
    now = TrainerState(9, 9, 9, 0.0, "data", "tokenizer", resolve(config))
    older = {key: value for key, value in now.config.items() if key != "fake_quant"}
    check_same_run(config, now, replace(now, config=older), lambda line: None)
    rounded = now.config | {"fake_quant": {"bits": 4, "group_size": None}}
    with pytest.raises(ConfigError, match="fake_quant.bits=null.*was trained with 4"):
        check_same_run(config, now, replace(now, config=rounded), lambda line: None)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("mixtral", {"num_local_experts": 4}), ("granitemoe", {"num_local_experts": 4})],
)
def test_experts_are_refused_rather_than_left_out(model_type, fields):
    config = replace(LLAMA, model_type=model_type, config=LLAMA.config | fields)
    model = build_meta_model(config, 300)
    with pytest.raises(ConfigError, match="fake_quant.bits=4: .*experts.* one tensor"):
        prepare_fake_quant(model, FakeQuantConfig(bits=4))
