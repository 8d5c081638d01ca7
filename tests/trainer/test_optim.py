"""AdamW decays matrices and nothing else, whatever a strategy makes of their shapes."""

import pytest
import torch
from torch.optim import AdamW

from core.errors import ConfigError
from core.settings.rules import check_settings
from parallel.config import DdpConfig, FsdpConfig, PrecisionConfig, ZeroConfig
from parallel.optimizer_state import ADAMW
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.small_run import MODEL, VOCAB
from trainer.model import Materializer, build_meta_model
from trainer.objective import NextTokenLoss
from trainer.optim import AdamWConfig, Decay, decayed_names

CONFIG = AdamWConfig(lr=2e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.25)
STRATEGIES = {"ddp": DdpConfig(), "fsdp": FsdpConfig(), "zero3": ZeroConfig(stage=3)}
SHAPES = {"linear.weight": (4, 4), "linear.bias": (4,), "norm.weight": (4,), "embed": (8, 4)}
MATRICES = {"linear.weight", "embed"}


def made_up():
    torch.manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def decays(optimizer, parameters):
    """Weight decay of each parameter by name."""
    names = {id(p): name for name, p in parameters.items()}
    return {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}


def test_settings_reach_the_optimizer():
    optimizer = CONFIG.build(made_up(), MATRICES)
    assert isinstance(optimizer, AdamW)
    for group in optimizer.param_groups:
        assert group["fused"] is True
        assert group["lr"] == 2e-3 and group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6


def test_what_decays_by_its_name_and_by_the_models_mark():
    model = torch.nn.Module()
    for name in ("q_norm", "experts", "mixer", "gate", "embed"):
        model.add_module(name, torch.nn.Module())
    for name in (
        *("q_norm.weight", "experts.gate_up_proj_bias", "mixer.A_log", "gate.weight"),
        *("experts.gate_up_proj", "mixer.in_proj", "embed.weight"),
    ):
        owner, leaf = name.split(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(torch.ones(2, 3)))
    model.gate.weight._no_weight_decay = True
    model.mixer.D = torch.nn.Parameter(torch.ones(3))
    every = {name for name, p in model.named_parameters() if p.ndim == 2}
    assert decayed_names(model, Decay.matrices) == every
    left = {"experts.gate_up_proj", "mixer.in_proj", "embed.weight"}
    assert decayed_names(model, Decay.auto) == left


def test_of_an_ordinary_model_all_matrices_decay():
    model = build_meta_model(MODEL, VOCAB)
    assert decayed_names(model, Decay.auto) == decayed_names(model, Decay.matrices)


def test_every_parameter_is_in_one_group():
    parameters = made_up()
    optimizer = CONFIG.build(parameters, MATRICES)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(parameters)
    assert decays(optimizer, parameters) == {
        "linear.weight": 0.25,
        "embed": 0.25,
        "linear.bias": 0.0,
        "norm.weight": 0.0,
    }


def test_decay_is_decoupled_and_of_matrices_only():
    """With no gradient AdamW multiplies by 1 - lr x decay and does nothing else."""
    parameters = made_up()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    CONFIG.build(parameters, MATRICES).step()
    for name, parameter in parameters.items():
        factor = 1 - 2e-3 * 0.25 if name in MATRICES else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
        assert torch.equal(parameter, before[name]) == (name not in MATRICES)


@pytest.mark.parametrize("decayed", [set(), set(SHAPES)])
def test_no_empty_group(decayed):
    """DeepSpeed takes none."""
    optimizer = CONFIG.build(made_up(), decayed)
    assert [len(g["params"]) for g in optimizer.param_groups] == [4]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"lr": -1e-3}, "optim.lr=-0.001"),
        ({"max_norm": 0.0}, "optim.max_norm=0.0"),
    ],
)
def test_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        check_settings(AdamWConfig(**values), "optim")
    check_settings(AdamWConfig(max_norm=None), "optim")


def groups_of_each():
    """By strategy: each parameter's decay, its local number of dimensions, and rates after set_lr.

    The names under decay are found as `trainer/run.py` finds them, before sharding.
    """
    results = {}
    with join_world() as world:
        for name, parallel in STRATEGIES.items():
            model = build_meta_model(MODEL, VOCAB)
            module = NextTokenLoss(model, fused=True)
            matrices = {n for n, p in model.named_parameters() if p.ndim >= 2}
            seen = {}

            def build(parameters, seen=seen, matrices=matrices):
                optimizer = CONFIG.build(parameters, matrices)
                seen |= {
                    "decays": decays(optimizer, parameters),
                    "shapes": {n: tuple(p.shape) for n, p in parameters.items()},
                    "optimizer": optimizer,
                }
                return optimizer

            strategy = parallel.build(world, PrecisionConfig())
            materialize = Materializer(module, model, MODEL, 0, world.device)
            strategy.setup(module, materialize, build, ADAMW)
            optimizer = seen.pop("optimizer")
            strategy.set_lr(0.125)
            seen["lrs"] = [group["lr"] for group in optimizer.param_groups]
            seen["matrices"] = matrices
            results[name] = seen
    return results


def test_names_decide_under_every_strategy():
    for rank in run_distributed(groups_of_each, 2):
        for name, seen in rank.items():
            matrices = seen["matrices"]
            assert len(matrices) == 1 + 2 * 7  # the tied embedding, seven in each block
            assert seen["decays"].keys() == seen["shapes"].keys()
            for parameter, decay in seen["decays"].items():
                assert decay == (0.25 if parameter in matrices else 0.0), (name, parameter)
                assert ("norm" in parameter) == (decay == 0.0), (name, parameter)
            assert seen["lrs"] == [0.125, 0.125], name
        assert set(rank["zero3"]["shapes"].values()) == {(0,)}, "shapes say nothing there"
