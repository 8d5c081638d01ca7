"""The fused loss is the plain one, computed in less memory."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from trainer import objective
from trainer.data.batch import IGNORE_INDEX
from trainer.objective import NextTokenLoss, fused_linear_cross_entropy


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_loss_and_gradients_equal_the_plain_ones(monkeypatch, bias, dtype):
    monkeypatch.setitem(objective._CHUNK_NUMEL, "cpu", 7 * 50)  # chunks of 7 rows, the last shorter
    torch.manual_seed(0)
    inputs = [
        torch.randn(33, 16).to(dtype),
        torch.randn(50, 16).to(dtype),
        torch.randn(50).to(dtype) if bias else None,
    ]
    targets = torch.randint(0, 50, (33,))
    targets[::4] = IGNORE_INDEX

    def run(function, dtype):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
        loss = function(*leaves)
        (loss / 3).backward()
        return loss.detach(), [None if t is None else t.grad for t in leaves]

    def plain(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")

    expected, expected_grads = run(plain, torch.float64)
    loss, grads = run(lambda *leaves: fused_linear_cross_entropy(*leaves, targets), dtype)
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        if wanted is not None:
            assert (grad.double() - wanted).norm() < tolerance * wanted.norm()
            assert grad.dtype is dtype


def test_logits_of_a_large_vocabulary_are_never_held():
    rows, vocab_size, hidden_size = 2048, 16384, 8
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        fused_linear_cross_entropy(
            hidden, weight, None, torch.randint(0, vocab_size, (rows,))
        ).backward()
    assert largest <= objective._CHUNK_NUMEL["cpu"] < rows * vocab_size / 4


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_both_ways_give_transformers_loss(model_type):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = AutoConfig.for_model(model_type, vocab_size=64, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(0, 64, (2, 17))
    logits = model(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    for fused in (True, False):
        loss = NextTokenLoss(model, fused)(tokens[:, :-1], tokens[:, 1:])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_documents_do_not_see_each_other_when_positions_restart():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    module = NextTokenLoss(AutoModelForCausalLM.from_config(config), fused=True).eval()
    first, second = torch.randint(0, 64, (2, 9)), torch.randint(0, 64, (2, 7))
    positions = torch.cat([torch.arange(9), torch.arange(7)]).expand(2, -1)
    targets = torch.full((2, 16), IGNORE_INDEX)
    targets[:, 9:] = torch.randint(0, 64, (2, 7))
    together = module(torch.cat([first, second], 1), targets, positions)
    alone = module(second, targets[:, 9:], torch.arange(7).expand(2, -1))
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
