"""The memory plan against what real models save, and real strategies hold."""

import json
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from core.errors import ConfigError
from tests.trainer.test_shape import composed
from trainer.distillation import fused_linear_distillation
from trainer.memory import _DISTILLATION_MATRICES, _LOSS_MATRICES, check_memory, plan_memory
from trainer.model import prepare_training
from trainer.objective import _CHUNK_NUMEL, fused_linear_cross_entropy
from trainer.shape import model_shape

SIZES = {
    "hidden_size": 192,
    "intermediate_size": 700,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "vocab_size": 64,
}
GPT2 = {"n_embd": 192, "n_inner": 700, "n_head": 6, "n_positions": 512, "vocab_size": 64}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}


def saved_bytes(family, num_layers, seq_len, is_bf16, is_checkpointed):
    """What forward of a batch of two keeps for backward, weights and their casts aside."""
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": num_layers}
    fields = (GPT2 if family == "gpt2" else SIZES) | layers
    if family == "qwen2":  # it has none of its own
        fields = {name: value for name, value in fields.items() if name != "head_dim"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    model.train()
    prepare_training(model, compile=False, checkpointing=is_checkpointed)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held: no address comes twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_bf16),
    ):
        model.get_decoder()(input_ids=torch.zeros(2, seq_len, dtype=torch.long), use_cache=False)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_activations_of_a_block(tmp_path, family, is_bf16, is_checkpointed):
    def of_a_block(seq_len):  # what does not depend on the number of blocks falls out
        deep, shallow = (
            saved_bytes(family, layers, seq_len, is_bf16, is_checkpointed) for layers in (3, 1)
        )
        return (deep - shallow) / 2

    measured = of_a_block(256) - of_a_block(128)  # and what does not depend on the tokens
    fields = GPT2 if family == "gpt2" else SIZES

    config = composed(
        "model=config",
        f"model.path={tmp_path}",
        "data.max_seq_len=128",
        "micro_batch_size=2",
        f"activation_checkpointing={is_checkpointed}",
        "precision=bf16" if is_bf16 else "precision=fp32",
    )

    def planned(num_layers):
        layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": num_layers}
        content = {"model_type": family, **fields, **layers}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return plan_memory(config, model_shape(config), 1).activations

    assert (planned(3) - planned(1)) / 2 == pytest.approx(measured, rel=0.05)


def test_the_loss_holds_the_chunk_of_the_objective():
    config = composed("model=llama_1b", "precision=bf16")
    shape = model_shape(config)
    expected = 4 * _CHUNK_NUMEL["cuda"] + 4 * shape.vocab_size * shape.hidden_size
    expected += 8 * 1024 * shape.hidden_size * 2
    assert plan_memory(config, shape, 1).loss == expected


class LargeTensors(TorchDispatchMode):
    """How many tensors of `numel` elements, of storages of their own, are alive at once at most."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.alive, self.most = numel, Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.numel:
            storage = out.untyped_storage().data_ptr()
            self.alive[storage] += 1
            weakref.finalize(out, self.alive.subtract, [storage])
            self.most = max(self.most, sum(count > 0 for count in self.alive.values()))
        return out


def test_matrices_of_logits_that_are_alive_at_once():
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(96, 8, requires_grad=True)
    targets = torch.zeros(64, dtype=torch.long)
    with LargeTensors(64 * 96) as seen:
        fused_linear_cross_entropy(hidden, weight, None, targets)
    assert seen.most == _LOSS_MATRICES
    student, teacher = (hidden, weight, None), (hidden.detach(), weight.detach(), None)
    with LargeTensors(64 * 96) as seen:
        fused_linear_distillation(*student, *teacher, targets, 2.0, 0.5)
    assert seen.most == _DISTILLATION_MATRICES


@pytest.mark.parametrize(
    ("words", "bytes_a_parameter"),
    [
        (["parallel=ddp"], 2),
        (["parallel=ddp", "objective.teacher_dtype=float32"], 4),
        (["parallel=fsdp"], 2 / 8),
        (["parallel=fsdp", "parallel.dp_replicate=2"], 2 / 4),
        (["parallel=zero", "parallel.stage=2"], 2),
        (["parallel=zero", "parallel.stage=3"], 2 / 8),
        (["parallel=zero", "parallel.stage=3", "parallel.offload_parameters=true"], 0),
    ],
)
def test_what_a_rank_holds_of_a_teacher(tmp_path, words, bytes_a_parameter):
    big = composed("model=llama_8b")
    content = {"model_type": "llama", "vocab_size": 128256, **big.model.config}
    (tmp_path / "config.json").write_text(json.dumps(content))
    base = ["model=llama_1b", "precision=bf16", *words]
    distil = composed("objective=distill", f"objective.teacher={tmp_path}", *base)
    shape, teacher = model_shape(distil), model_shape(big)
    pretrain = composed(*(word for word in base if not word.startswith("objective.")))
    alone, plan = plan_memory(pretrain, shape, 8), plan_memory(distil, shape, 8)
    gathered = 0 if bytes_a_parameter in (2, 4) else 2 * teacher.num_block_parameters
    gathered += 0 if bytes_a_parameter in (2, 4) else 2 * 128256 * 4096 + 4096
    held = bytes_a_parameter * teacher.num_parameters
    assert plan.teacher == pytest.approx(held + 2 * gathered)
    assert plan.loss - alone.loss == pytest.approx(3 * 4 * _CHUNK_NUMEL["cuda"])
    assert plan.total - alone.total == pytest.approx(plan.teacher + plan.loss - alone.loss)
    if bytes_a_parameter == 0:
        assert plan.host - alone.host == pytest.approx(2 * teacher.num_parameters / 8)


def test_a_teacher_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path):
    content = {
        "model_type": "llama",
        "vocab_size": 128256,
        **composed("model=llama_8b").model.config,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    words = ["objective=distill", f"objective.teacher={tmp_path}", "precision=bf16"]
    config = composed("model=llama_1b", "parallel=ddp", "micro_batch_size=1", *words)
    check_memory(config, 8, 80 * 2**30)
    with pytest.raises(ConfigError, match=r"teacher 15\.0.*; use parallel=fsdp"):
        check_memory(config, 8, 32 * 2**30)


@pytest.mark.parametrize(
    ("words", "world_size", "bytes_a_parameter"),
    [
        (["parallel=ddp"], 4, 16),
        (["parallel=fsdp"], 4, 4),
        (["parallel=fsdp", "parallel.dp_replicate=2"], 4, 8),
        (["parallel=zero", "parallel.stage=1"], 4, 4 + 4 + 3),
        (["parallel=zero", "parallel.stage=2"], 4, 4 + 1 + 3),
        (["parallel=zero", "parallel.stage=3"], 4, 1 + 1 + 3),
        (["parallel=zero", "parallel.stage=2", "parallel.offload_optimizer=true"], 4, 4 + 1),
    ],
)
def test_what_a_rank_holds_of_the_training_state(words, world_size, bytes_a_parameter):
    config = composed("model=llama_8b", "precision=bf16", *words)
    shape = model_shape(config)
    plan = plan_memory(config, shape, world_size)
    held = plan.parameters + plan.gradients + plan.optimizer
    assert held == pytest.approx(bytes_a_parameter * shape.num_parameters)


def test_a_rank_has_no_more_rows_than_the_global_batch_gives_it():
    few = composed("global_batch_size=8", "micro_batch_size=8")
    shape = model_shape(few)
    one, four = (plan_memory(few, shape, n).activations for n in (1, 4))
    assert one == pytest.approx(4 * four)


@pytest.mark.parametrize(
    ("words", "ranks", "fix"),
    [
        (("micro_batch_size=16",), 8, "; use micro_batch_size=1"),
        (("micro_batch_size=1", "parallel=ddp"), 8, "; use parallel=fsdp"),
        (
            ("parallel=ddp",),
            1,
            "; use 2 GPUs parallel=fsdp activation_checkpointing=true micro_batch_size=2",
        ),
        (
            ("data.max_seq_len=32768",),
            8,
            "; use activation_checkpointing=true micro_batch_size=2",
        ),
        (("data.max_seq_len=4000000",), 8, "use a smaller model or a shorter data.max_seq_len"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(words, ranks, fix):
    base = ("model=llama_8b", "precision=bf16", "parallel=fsdp", "global_batch_size=64")
    config = composed(*base, "data.max_seq_len=4096", *words)
    with pytest.raises(ConfigError) as refused:
        check_memory(config, ranks, 80 * 2**30)
    line = str(refused.value)
    assert line.startswith(f"micro_batch_size={config.micro_batch_size}: a rank needs about ")
    assert line.endswith(fix), line
    assert "\n" not in line and refused.value.exit_code == 2


def test_the_way_out_fits_and_an_estimate_slightly_beyond_is_tried():
    words = ("model=llama_8b", "precision=bf16", "parallel=fsdp", "micro_batch_size=8")
    config = composed(*words, "data.max_seq_len=4096", "global_batch_size=64")
    needed = plan_memory(config, model_shape(config), 8).total
    check_memory(config, 8, int(needed / 1.09))
    with pytest.raises(ConfigError):
        check_memory(config, 8, int(needed / 1.11))


def test_a_family_without_a_plan_is_left_to_its_gpu():
    config = composed("model.model_type=phi3")
    check_memory(config, 1, 1)
