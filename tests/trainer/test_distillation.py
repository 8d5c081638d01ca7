"""Distillation: the same numbers in less memory, whatever the strategy, by a teacher that stays."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from parallel.config import DdpConfig, Dtype, FsdpConfig, PrecisionConfig, ZeroConfig
from parallel.optimizer_state import ADAMW
from parallel.strategy import decoder_blocks
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.small_run import MODEL, VOCAB, SmallRun
from tests.trainer.test_model import held_numel
from trainer import objective
from trainer.config import DistillConfig
from trainer.data.batch import IGNORE_INDEX
from trainer.distillation import divergence_sum, fused_linear_distillation
from trainer.model import Materializer, build_meta_model
from trainer.optim import AdamWConfig

# -- The fused loss ---------------------------------------------------------------------------


def plain(student, teacher, targets, temperature, weight):
    """The definition, for (N, V) logits."""
    counted = targets != IGNORE_INDEX
    q, p = ((t[counted] / temperature).softmax(1) for t in (student, teacher))
    divergence = temperature**2 * (p * (p.log() - q.log())).sum()
    entropy = F.cross_entropy(student[counted], targets[counted], reduction="sum")
    return divergence, entropy, weight * divergence + (1 - weight) * entropy


def case(bias, dtype=torch.float32):
    """Student's and teacher's hidden states, head and bias; targets, of which some do not count."""
    torch.manual_seed(0)
    heads = [
        torch.randn(*shape).to(dtype) if shape is not None else None
        for width in (16, 24)
        for shape in ((33, width), (50, width), (50,) if bias else None)
    ]
    targets = torch.randint(0, 50, (33,))
    targets[::4] = IGNORE_INDEX
    return heads[:3], heads[3:], targets


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.7), (0.5, 0.0)])
def test_fused_loss_and_gradients_equal_the_plain_ones(
    monkeypatch, bias, dtype, temperature, weight
):
    monkeypatch.setitem(objective._CHUNK_NUMEL, "cpu", 7 * 50)  # chunks of 7 rows, the last shorter
    student, teacher, targets = case(bias, dtype)

    def run(function, dtype):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in student]
        taught = [None if t is None else t.to(dtype).requires_grad_() for t in teacher]
        sums = function(*leaves, *taught)
        (sums[2] / 3).backward()
        assert all(t is None or t.grad is None for t in taught) or function is in_full
        return [s.item() for s in sums], [None if t is None else t.grad for t in leaves]

    def in_full(*tensors):
        logits = [F.linear(*tensors[:3]), F.linear(*tensors[3:]).detach()]
        return plain(*logits, targets, temperature, weight)

    def fused(*tensors):
        return fused_linear_distillation(*tensors, targets, temperature, weight)

    expected, expected_grads = run(in_full, torch.float64)
    sums, grads = run(fused, dtype)
    tolerance = 2e-6 if dtype is torch.float32 else 3e-2
    assert sums == pytest.approx(expected, rel=tolerance)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        if wanted is not None:
            assert (grad.double() - wanted).norm() < tolerance * wanted.norm()
            assert grad.dtype is dtype


def test_without_the_fused_loss():
    student, teacher, targets = case(bias=True, dtype=torch.float64)
    logits, taught = F.linear(*student).requires_grad_(), F.linear(*teacher)
    expected, *_ = plain(logits, taught, targets, 3.0, 1.0)
    [wanted] = torch.autograd.grad(expected, logits)
    divergence = divergence_sum(logits, taught, targets, 3.0)
    [grad] = torch.autograd.grad(divergence, logits)
    assert divergence.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(grad, wanted, atol=1e-12)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    student, _, targets = case(bias=False)
    leaves = [t if t is None else t.requires_grad_() for t in student]
    copies = [t if t is None else t.detach() for t in student]
    divergence, _, loss = fused_linear_distillation(*leaves, *copies, targets, 2.0, 1.0)
    loss.backward()
    assert divergence.item() == pytest.approx(0, abs=1e-4)
    assert leaves[0].grad.abs().max() < 1e-5


def test_logits_of_a_large_vocabulary_are_never_held():
    rows, vocab_size = 2048, 16384
    student = [torch.randn(n, 8, requires_grad=True) for n in (rows, vocab_size)]
    teacher = [torch.randn(n, 8) for n in (rows, vocab_size)]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        targets = torch.randint(0, vocab_size, (rows,))
        *_, loss = fused_linear_distillation(*student, None, *teacher, None, targets, 2.0, 0.5)
        loss.backward()
    assert largest <= objective._CHUNK_NUMEL["cpu"] < rows * vocab_size / 4


# -- Strategies -------------------------------------------------------------------------------

STRATEGIES = {
    "ddp": DdpConfig(),
    "fsdp": FsdpConfig(),
    "hsdp": FsdpConfig(dp_replicate=2),
    "zero1": ZeroConfig(stage=1),
    "zero2": ZeroConfig(stage=2),
    "zero3": ZeroConfig(stage=3),
}
IN_BF16 = {"precision": PrecisionConfig(param_dtype=Dtype.bfloat16)}
VARIANTS = {  # name: (strategy, what is set)
    **{name: (name, {}) for name in STRATEGIES},
    **{f"{name} in bf16": (name, IN_BF16) for name in ("ddp", "fsdp", "zero3")},
    "without the fused loss": ("fsdp", {"fused": False}),
    "teacher in bf16": ("fsdp", {"teacher_dtype": Dtype.bfloat16}),
}
STEPS = 6


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A wider and deeper Llama with dropout and clear opinions, the same on every text."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(9)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_dropout=0.5,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.embed_tokens.weight += torch.randn(96)
    model.save_pretrained(folder)
    return folder


def held_bytes(teacher):
    """Of parameters of the teacher that this rank has in memory."""
    total = 0
    for parameter in teacher.parameters():
        if isinstance(parameter, DTensor):
            parameter = parameter.to_local()
        shard = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's
        total += shard.numel() * shard.element_size()
    return total


def distil(world, folder, parallel, precision=None, fused=True, **settings):
    """Trains, and tells what was seen."""
    wanted = DistillConfig(teacher=str(folder), temperature=2.0, weight=0.8, **settings)
    model = dataclasses.replace(MODEL, fused_loss=fused)
    run = SmallRun(parallel, world, model=model, precision=precision, objective=wanted)
    teacher, held, answers = run.module.teacher, held_bytes(run.module.teacher), []
    teacher.register_forward_hook(lambda *call: answers.append(call[-1].double().sum().item()))
    losses = run.train(STEPS)
    assert run.module.training and not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert held_bytes(teacher) == held, "what was gathered is let go"
    tokens = torch.arange(2 * 9).view(2, 9) % VOCAB
    run.module.eval()
    with torch.no_grad():
        validation = run.strategy.forward(input_ids=tokens[:, :-1], targets=tokens[:, 1:])
        last = run.strategy.forward(input_ids=tokens[:, :-1])
    assert last.shape == (2, VOCAB) and len(answers) == 2 * STEPS, "it is not asked in evaluation"
    return {
        "losses": losses,
        "held_bytes": held,
        "answers": answers,
        "validation": validation.item(),
        "state": set(run.strategy.state()),
    }


def peak_while_building(world, folder, parallel):
    """The most elements of the teacher that this rank held after any part was filled."""
    model = build_meta_model(MODEL, VOCAB)
    module = DistillConfig(teacher=str(folder)).build(model, MODEL, "")
    fill = module.materialize_with(
        Materializer(module, model, MODEL, 0, world.device), world.device
    )
    held = []

    def record(part):
        fill(part)
        held.append(held_numel(module.teacher))

    names = {name for name, p in model.named_parameters() if p.ndim >= 2}
    strategy = parallel.build(world, PrecisionConfig())
    strategy.setup(module, record, partial(AdamWConfig().build, decayed=names), ADAMW)
    return max(held)


def distil_each(folder):
    with join_world() as world:
        found = {
            name: distil(world, folder, STRATEGIES[strategy], **settings)
            for name, (strategy, settings) in VARIANTS.items()
        }
        for name in ("ddp", "fsdp", "zero3"):
            found[name]["peak_numel"] = peak_while_building(world, folder, STRATEGIES[name])
    return found


@pytest.fixture(scope="module")
def alone(teacher):
    """What one rank saw under DDP."""
    with join_world() as world:
        return distil(world, teacher, DdpConfig())


@pytest.fixture(scope="module")
def gang(teacher):
    """What each of two ranks saw: {variant: findings}."""
    return run_distributed(distil_each, 2, teacher)


@pytest.mark.parametrize("name", [*STRATEGIES, "without the fused loss"])
def test_losses_do_not_depend_on_strategy_or_ranks(alone, gang, name):
    assert alone["losses"][-1][0] < alone["losses"][0][0] - 0.5, "it did learn"
    for rank in gang:
        losses = rank[name]["losses"]
        for (loss, norm), (wanted, wanted_norm) in zip(losses, alone["losses"], strict=True):
            assert loss == pytest.approx(wanted, abs=1e-5)
            assert norm == pytest.approx(wanted_norm, rel=1e-4)
        assert rank[name]["validation"] == pytest.approx(alone["validation"], rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_teacher_computes_in_its_own_type(gang, name):
    for rank, expected in zip(gang, (r["ddp"]["answers"] for r in gang), strict=True):
        answers = rank[name]["answers"]
        if name == "without the fused loss":  # they are logits
            continue
        exact = name != "teacher in bf16"
        assert (answers == pytest.approx(expected, rel=1e-5)) == exact, name
        assert answers == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_teacher_is_sharded_where_parameters_are(alone, gang, name):
    strategy, settings = VARIANTS[name]
    expected = alone["held_bytes"] / (2 if strategy in ("fsdp", "zero3") else 1)
    expected /= 2 if "teacher_dtype" in settings else 1
    for rank in gang:
        assert rank[name]["held_bytes"] == pytest.approx(expected, rel=0.01)


def test_no_rank_ever_holds_the_full_teacher(teacher, gang):
    model = AutoModelForCausalLM.from_pretrained(teacher)
    full = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in decoder_blocks(model)[0].parameters())
    largest = max(block, full - 4 * block)
    for rank in gang:
        assert rank["ddp"]["peak_numel"] == full, "the measure itself"
        for name in ("fsdp", "zero3"):  # half of all, and the part in full that is not sharded yet
            assert full / 2 <= rank[name]["peak_numel"] <= full / 2 + largest / 2 + 200


def test_the_teacher_is_in_no_checkpoint(alone, gang):
    assert not [name for name in alone["state"] if "teacher" in name]
    for name in VARIANTS:
        assert set().union(*(rank[name]["state"] for rank in gang)) == alone["state"], name


def test_evaluation_is_plain_cross_entropy(alone):
    """The student says the teacher's words, not the next token: so its loss there is high."""
    assert alone["validation"] / 16 > alone["losses"][-1][0] + 1
