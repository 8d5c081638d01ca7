"""Experts that transformers fuses: each matrix beside stock transformers, and a GPTQ in float64."""

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from compression.block import watch_inputs
from compression.experts import SplitExperts
from compression.layerwise import compress
from compression.methods.equalizing import Awq
from compression.methods.gptq import gptq_codes
from compression.methods.pruning import Prune
from compression.methods.rounding import RoundToNearest
from compression.quantizer import fit_grid
from compression.result import Result
from compression.run import _few_tokens
from compression.scheme import Activation, Scheme
from compression.source import choose_layers
from compression.sparsity import Criterion, Pattern
from compression.stream import BlockStream
from compression.targets import compressed_tensors, huggingface, torchao
from core.errors import ConfigError
from tests.compression.blocks import error_after, outputs, take_block
from tests.compression.conftest import save_model

FAMILIES = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
}
W4 = Scheme(bits=4, group_size=32)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that makes a model of a type, once."""
    made = {}

    def get(model_type, **fields):
        key = model_type, str(fields)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("models") / model_type
            sizes = FAMILIES.get(model_type, {}) | {"num_hidden_layers": 1}
            model = save_model(made[key], model_type, **sizes | fields)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(8.0 if parameter.ndim == 3 else 1.0)
            model.save_pretrained(made[key])
        return made[key]

    return get


def stock(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def logits(model):
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def experts_of(model):
    return model.model.layers[0].mlp.experts


@torch.no_grad()
def rounded_in_place(model, bits, group_size):
    """A stock model whose matrices in blocks are rounded to the nearest, by the formula alone."""

    def nearest(weight):
        grouped = weight.unflatten(-1, (-1, group_size or weight.shape[-1]))
        scale = 2 * grouped.abs().amax(-1, keepdim=True) / (2**bits - 1)
        return (grouped / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale

    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(nearest(module.weight).flatten(-2))
        for parameter in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            parameter.copy_(nearest(parameter).flatten(-2))
    return model


def packed(folder, out, scheme, target):
    layers = choose_layers(BlockStream(folder), ["*"], [])
    target.check_parent(folder, layers, {scheme}, "target")
    (out / "result").mkdir(parents=True)
    (out / "artifact").mkdir()
    result = Result(out / "result", torch.float32)
    methods = {"round": RoundToNearest(scheme)}
    compress(folder, methods, layers, None, result, lambda done, total: None)
    target.pack(result, folder, out / "artifact")
    return out / "artifact", layers


def names_in(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    "model_type, target, expert",
    [
        ("mixtral", compressed_tensors, "block_sparse_moe.experts.3.w2.weight_packed"),
        pytest.param(
            "mixtral", huggingface, "block_sparse_moe.experts.3.w1.weight", marks=pytest.mark.long
        ),
        pytest.param(
            "qwen3_moe",
            compressed_tensors,
            "mlp.experts.3.gate_proj.weight_packed",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "granitemoe",
            huggingface,
            "block_sparse_moe.input_linear.weight",
            marks=pytest.mark.long,
        ),
    ],
)
def test_an_artifact_is_what_stock_transformers_makes_of_rounded_weights(
    model_type, target, expert, folder_of, tmp_path
):
    folder = folder_of(model_type)
    artifact, layers = packed(folder, tmp_path, W4, target)
    assert f"model.layers.0.{expert}" in names_in(artifact)
    wanted = logits(stock(folder))
    rounded = logits(_rounded(folder, model_type))
    found = logits(target.load(artifact))
    assert (rounded - wanted).norm() > 0.02 * wanted.norm()
    torch.testing.assert_close(found, rounded, rtol=1e-4, atol=1e-4)
    stored = target.layer_bytes(artifact, set(layers))
    files = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    assert 0 < stored < files


def _rounded(folder, model_type):
    model = stock(folder)
    if model_type == "granitemoe":
        model.model.layers[0].mlp = model.model.layers[0].block_sparse_moe
    return rounded_in_place(model, W4.bits, W4.group_size)


def test_experts_as_layers_compute_what_the_fused_ones_do(folder_of):
    experts = experts_of(stock(folder_of("mixtral")))
    given = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(3, (50, 2), generator=torch.Generator().manual_seed(1))  # one has none
    weights = torch.rand(50, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = experts(given, chosen, weights)
        torch.testing.assert_close(SplitExperts(experts)(given, chosen, weights), wanted)


def gptq_in_float64(weight, gram, grid, damping):
    """One weight after another as in the paper, each error made up for by those that are left."""
    order = gram.diagonal().argsort(descending=True, stable=True)
    left, gram = weight.double()[:, order], gram[order][:, order].clone()
    gram.diagonal().add_(damping * gram.diagonal().mean())
    scales = grid.scales.double().repeat_interleave(weight.shape[1] // grid.scales.shape[1], 1)
    scales, codes = scales[:, order], torch.empty_like(left)
    inverse = torch.linalg.inv(gram)
    for i in range(left.shape[1]):
        codes[:, i] = (left[:, i] / scales[:, i]).round().clamp(-8, 7)
        error = (left[:, i] - codes[:, i] * scales[:, i]) / inverse[0, 0]
        left[:, i + 1 :] -= error[:, None] * inverse[0, 1:]
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return codes[:, order.argsort()]


def test_gptq_of_an_expert_sees_the_tokens_that_are_routed_to_it(folder_of):
    folder = folder_of("mixtral")
    block = take_block(folder)
    gate, down = (f"model.layers.0.mlp.experts.2.{n}" for n in ("gate_proj", "down_proj"))
    inputs = {name: found for found in watch_inputs(block) for name in found.names}
    routed = []
    model = stock(folder)
    experts_of(model).register_forward_pre_hook(lambda _, args: routed.append(args))
    with torch.no_grad():
        for batch in block.inputs():
            position = model.model.rotary_emb(batch, torch.arange(batch.shape[1])[None])
            mask = torch.full((batch.shape[1],) * 2, -torch.inf).triu(1)[None, None]
            model.model.layers[0](batch, position_embeddings=position, attention_mask=mask)
    given = torch.cat([x[(index == 2).any(-1)] for x, index, _ in routed]).double()
    assert inputs[gate].num_tokens == inputs[down].num_tokens == len(given) < len(routed) * 64
    gram = given.T @ given / len(given)
    torch.testing.assert_close(inputs[gate].gram.double(), gram, rtol=1e-4, atol=1e-5)
    weight = block.layers[gate].weight.data
    grid = fit_grid(weight, W4, torch.float32)
    wanted = gptq_in_float64(weight, gram, grid, 0.01)
    found = gptq_codes(weight, inputs[gate].gram, grid, 0.01)
    assert (found == wanted).double().mean() > 0.99
    assert (found != grid.encode(weight)).double().mean() > 0.05


def test_awq_scales_what_an_expert_makes_and_changes_the_block_less_than_rounding(folder_of):
    folder = folder_of("mixtral")
    by_rounding, _ = error_after(folder, RoundToNearest(W4))
    by_awq, block = error_after(folder, Awq(W4))
    ratios = {n: note["ratio"] for n, note in block.notes.items() if "ratio" in note}
    assert any(ratio for name, ratio in ratios.items() if name.endswith("2.down_proj"))
    assert by_awq < by_rounding


def test_experts_that_few_tokens_reach_are_told_of_and_treated_as_the_others(folder_of):
    block = take_block(folder_of("mixtral"), num_batches=1)
    unseen = block.module.mlp.gate
    unseen.weight.data[3] = -unseen.weight.data[:3].abs().sum(0) * 1e3  # a token either hates it,
    unseen.weight.data[3].abs_().neg_()
    block.inputs = lambda: iter([torch.rand(1, 8, 64)])
    block.module.post_attention_layernorm.weight.data.abs_()
    Prune(Criterion.wanda, 0.5, Pattern.unstructured, 0.01).apply(block)
    counts = {name: note["calibration_tokens"] for name, note in block.notes.items()}
    assert set(counts) == set(block.layers)
    (said,) = _few_tokens(block.notes)
    assert "raise calibration.num_samples" in said and f"of {len(counts)} layers" in said
    for layer in block.layers.values():
        assert (layer.weight == 0).float().mean() > 0.45
    assert torch.isfinite(outputs(block)).all()


@pytest.mark.parametrize(
    "model_type, fields, target, scheme, said",
    [
        ("mixtral", {}, torchao, Scheme(), "use target=compressed_tensors, or leave them out"),
        (
            "mixtral",
            {},
            compressed_tensors,
            Scheme(activation=Activation.int8),
            "inputs; .*layers.exclude",
        ),
        (
            "granitemoe",
            {},
            compressed_tensors,
            Scheme(),
            "model.layers.0.block_sparse_moe.experts.0.gate_proj",
        ),
        (
            "falcon",
            dict(num_hidden_layers=1, new_decoder_architecture=True),
            compressed_tensors,
            Scheme(),
            "query_key_value is a FalconLinear.*use target=huggingface",
        ),
        (
            "mamba",
            dict(num_hidden_layers=1, state_size=8),
            torchao,
            Scheme(),
            r"backbone.layers.0.mixer.dt_proj.*exclude=\['\*.dt_proj\*'",
        ),
    ],
)
def test_what_no_target_loads_again_is_refused(model_type, fields, target, scheme, said, folder_of):
    folder = folder_of(model_type, **fields)
    layers = choose_layers(BlockStream(folder), ["*"], [])
    with pytest.raises(ConfigError, match=said):
        target.check_parent(folder, layers, {scheme}, "target")
    huggingface.check_parent(folder, layers, {scheme}, "target")


def test_some_experts_alone_are_refused(folder_of):
    folder = folder_of("mixtral")
    layers = choose_layers(BlockStream(folder), ["*"], ["*.experts.1.down_proj"])
    with pytest.raises(ConfigError, match="target=compressed_tensors: .*experts.1.down_proj"):
        compressed_tensors.check_parent(folder, layers, {Scheme()}, "target")
    rest = choose_layers(BlockStream(folder), ["*"], ["*.experts.*"])
    compressed_tensors.check_parent(folder, rest, {Scheme()}, "target")


@pytest.mark.parametrize(
    "model_type, fields, said",
    [
        ("gpt2", dict(n_embd=64, n_head=4, n_layer=1), "no linear layers .*, but Conv1D"),
        (
            "gpt_oss",
            dict(num_local_experts=4, num_hidden_layers=1, head_dim=16),
            r"is a GptOssExperts .*layers.exclude=\['\*.experts'\]",
        ),
    ],
)
def test_matrices_that_are_no_linear_layers_are_refused(model_type, fields, said, folder_of):
    with pytest.raises(ConfigError, match=said):
        choose_layers(BlockStream(folder_of(model_type, **fields)), ["*"], [])
