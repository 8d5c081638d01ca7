"""`python -m compression` from its words to an artifact that loads."""

import contextlib
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compression import run as run_module
from compression.artifact import check_replaceable, held, read_report
from compression.reload import Reloaded
from compression.samples import draw_samples
from core.errors import ConfigError
from core.folder import sha256_of
from tests import programs
from tests.compression.conftest import SMALL, save_model
from tests.compression.test_samples import settings


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def packed(recipe, target, most_bits, *words, is_long=True):
    marks = pytest.mark.long if is_long else ()
    return pytest.param([f"recipe={recipe}", *words], target, most_bits, marks=marks)


def test_what_is_timed_fits_the_model_unless_somebody_says_otherwise(parent):
    def timed(*words):
        return run_module._timed(settings(*words).evaluation, parent)  # of 256 positions

    assert timed().prompt_tokens == 128
    assert timed("evaluation.new_tokens=200").prompt_tokens == 56
    assert timed("evaluation.prompt_tokens=200").prompt_tokens == 200
    with pytest.raises(ConfigError, match="evaluation.prompt_tokens=200: .* 300"):
        timed("evaluation.prompt_tokens=200", "evaluation.new_tokens=100")
    with pytest.raises(ConfigError, match="evaluation.new_tokens=256: "):
        timed("evaluation.new_tokens=256")
    assert timed("evaluation.new_tokens=900", "evaluation.speed=false").prompt_tokens == 128


@pytest.mark.parametrize(
    ("words", "target", "most_bits"),
    [
        packed("int8_weight_only", "compressed_tensors", 8.6),
        packed("int8_weight_only", "torchao", 9.0, is_long=False),
        packed("int8_dynamic", "torchao", 9.0),
        packed("int8_dynamic", "compressed_tensors", 8.6, is_long=False),
        packed("w8a8_smoothquant", "compressed_tensors", 8.6),
        packed("float8_dynamic", "compressed_tensors", 8.6),
        packed(
            "int4_weight_only", "compressed_tensors", 4.8, "recipe.int4_weight_only.group_size=32"
        ),
        packed(
            "int4_gptq",
            "compressed_tensors",
            4.8,
            "recipe.int4_gptq.group_size=32",
            is_long=False,
        ),
        packed("int4_awq", "compressed_tensors", 4.8, "recipe.int4_awq.group_size=32"),
        packed("prune_sparsegpt", "huggingface", 16.1),
    ],
)
def test_an_artifact_computes_what_was_evaluated(
    words, target, most_bits, compress, parent, tmp_path
):
    # torchao's artifact is loaded again by a program that is executed; see tests/programs.py
    with programs.execute_programs() if target == "torchao" else contextlib.nullcontext():
        code, out, err = compress(f"model={parent}", *words, f"target={target}", "out=x")
    assert code == 0, err
    artifact = tmp_path / "x" / target
    report = read_report(artifact)
    assert report["reloaded_snr_db"] > 20
    assert 0 < report["evaluation"]["kl_nats"]["mean"] < 3
    parameters = load(parent).model.layers.parameters()
    num_weights = sum(p.numel() for p in parameters if p.ndim == 2)
    if target != "huggingface":
        assert report["quantized_layer_bytes"] * 8 / num_weights < most_bits
        if most_bits < 5:
            assert report["quantized_layer_bytes"] < 0.30 * 2 * num_weights
    assert not (tmp_path / "x" / ".work").exists()
    ids = torch.randint(300, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.isfinite(load(artifact)(ids).logits).all()


@pytest.fixture(scope="module")
def rounded(parent, text, tmp_path_factory):
    """An artifact in int8."""
    out = tmp_path_factory.mktemp("rounded") / "x"
    words = ["data=jsonl", f"data.path={text}", "data.column=text", *SMALL]
    config = settings(f"parent.model={parent}", f"out={out}", *words, "evaluation.speed=false")
    return run_module.run(config, lambda: False) / "compressed_tensors"


def test_a_report_says_what_the_artifact_is_as_it_is_loaded(rounded, parent, text):
    words = ["data=jsonl", f"data.path={text}", "data.column=text", *SMALL]
    ids = draw_samples(settings(f"parent.model={parent}", *words), parent, lambda: False).evaluation
    models = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval(), load(rounded)
    with torch.no_grad():
        log_p, log_q = (m(ids).logits[:, :-1].float().log_softmax(-1) for m in models)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    report = read_report(rounded)
    assert report["as_loaded"]["dtype"] == "bfloat16"
    assert report["as_loaded"]["kl_nats"]["mean"] == pytest.approx(kl, rel=0.05)
    assert report["evaluation"]["kl_nats"]["mean"] != pytest.approx(kl, rel=0.001)


def test_lineage_lists_every_file(rounded, parent):
    lineage = json.loads((rounded / "lineage.json").read_text())
    found = {p.name: sha256_of(p) for p in rounded.iterdir() if p.name != "lineage.json"}
    assert {name: entry["sha256"] for name, entry in lineage["files"].items()} == found
    assert lineage["parent"]["files"]["model.safetensors"] == sha256_of(
        parent / "model.safetensors"
    )
    assert lineage["compression"]["steps"]["int8_weight_only"]["bits"] == 8
    assert len(lineage["tokenizer_fingerprint"]) == 64


def test_steps_in_order_and_twice_the_same(compress, parent, tmp_path):
    words = [
        f"model={parent}",
        "recipe=[prune_wanda,int4_gptq]",
        "recipe.int4_gptq.group_size=32",
        "recipe.prune_wanda.pattern=two_of_four",
        "evaluation.speed=false",
    ]
    assert compress(*words, "out=a")[0] == 0
    assert compress(*words, "out=b")[0] == 0
    files = [
        load_file(tmp_path / out / "compressed_tensors" / "model.safetensors") for out in ("a", "b")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    model = load(tmp_path / "a" / "compressed_tensors")
    model(torch.tensor([[1]]))  # only now are its weights unpacked
    weight = model.model.layers[1].mlp.up_proj.weight
    assert ((weight.detach() == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all()


def test_a_stopped_compression_goes_on(compress, parent, tmp_path, monkeypatch):
    words = [f"model={parent}", "recipe=int4_gptq", "recipe.int4_gptq.group_size=32"]
    words.append("evaluation.speed=false")
    assert compress(*words, "out=whole")[0] == 0
    asked = []

    def stop_at_the_second_block():
        asked.append((tmp_path / "x/.work/result/block-00001.safetensors").exists())
        return asked[-1]

    monkeypatch.setattr("compression.__main__._stop_requested", stop_at_the_second_block)
    code, _, err = compress(*words, "out=x")
    assert code == 33 and "goes on from there" in err
    monkeypatch.setattr("compression.__main__._stop_requested", lambda: False)
    code, _, err = compress(*words, "out=x")
    assert code == 0 and "going on after block 2 of 3" in err
    file = "compressed_tensors/model.safetensors"
    assert sha256_of(tmp_path / "x" / file) == sha256_of(tmp_path / "whole" / file)


def test_a_run_brings_its_export_and_its_data(compress, parent, text, tmp_path):
    run = tmp_path / "runs" / "small"
    save_model(run / "export")
    data = {
        "kind": "jsonl",
        "path": str(text),
        "column": "text",
        "max_seq_len": 32,
        "tokenizer": "train",
        "tokenizer_vocab_size": 300,
    }
    (run / "config.yaml").write_text(json.dumps({"data": data}))
    small = [word for word in SMALL if not word.startswith("data.")]
    code, out, err = compress("run=runs/small", *small, data=False)
    assert code == 0, err
    assert (run / "compressed/int8_weight_only/compressed_tensors/config.json").is_file()
    assert "same greedy token" in out
    words = ["run=small", *small, "evaluation.speed=false"]
    code, _, err = compress(*words, data=False)  # by its name, and again
    assert code == 0, err


@pytest.mark.long
def test_several_recipes_make_a_plot(compress, parent, tmp_path):
    words = (f"model={parent}", "evaluation.speed=false", "recipe=int8_weight_only,prune_wanda")
    code, _, err = compress("--multirun", *words)
    assert code == 0, err
    assert not (tmp_path / "compressed/multirun.yaml").exists()
    assert (tmp_path / "compressed/pareto.png").stat().st_size > 10_000
    code, _, err = compress(*words, "out=x", "--multirun")
    assert code == 0, err
    found = {path.parent.parent.name for path in (tmp_path / "x").glob("*/*/compression.json")}
    assert found == {"int8_weight_only", "prune_wanda"}


def test_an_artifact_that_computes_something_else_is_not_kept(
    compress, parent, tmp_path, monkeypatch
):
    other = Reloaded("bfloat16", {}, torch.randn(2, 32, 320))
    monkeypatch.setattr(run_module, "reload", lambda *_: other)
    code, _, err = compress(f"model={parent}", "out=x")
    assert code == 1 and "it was not kept" in err
    assert not (tmp_path / "x" / "compressed_tensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "run=None: exactly one of run and model"),
        (["model=nowhere"], "model=nowhere: there is no such folder"),
        (["run=nowhere"], "run=nowhere: "),
        (["recipe=nope", "model=PARENT"], "recipe=nope: there is no such option"),
        (["recipe=[]", "model=PARENT"], "recipe=???: must be given"),
        (["model=PARENT", "recipe=auto", "evaluation.speed=false"], "evaluation.speed=false: "),
        (
            [
                "model=PARENT",
                "recipe=[prune_magnitude,heal]",
                "recipe.heal.overrides=['no_such_key=1']",
            ],
            "the trainer refuses it: no_such_key=1: there is no such key",
        ),
        (["model=PARENT", "data.max_seq_len=9999"], "data.max_seq_len=9999: the model has 256"),
        (
            ["model=PARENT", "recipe=int8_dynamic", "target=huggingface"],
            "target=huggingface: dense weights do not round their inputs to int8",
        ),
        (["model=PARENT", "target=gpu"], "target=gpu: "),
        (["model=PARENT", "target=huggingface,torchao"], "target"),
        (
            ["model=PARENT", "recipe.int8_weight_only.bit=4"],
            "no such key in recipe.int8",
        ),
        (["model=PARENT", "recipe.int8_weight_only.bits=9"], "bits=9: must be from 2 to 8"),
        (["model=PARENT", "recipe=int4_gptq"], "does not divide the 64 inputs of model.layers.0"),
        (
            [
                "model=PARENT",
                "recipe=int4_awq",
                "recipe.int4_awq.symmetric=false",
                "recipe.int4_awq.group_size=32",
            ],
            "set symmetric=true",
        ),
        (["model=PARENT", "recipe=float8_dynamic", "target=torchao"], "or a GPU"),
        (["model=PARENT", "layers.include=['*.nope']"], "matches no linear layer"),
        (["model=PARENT", "layers.exclude=['*']"], "leaves no layer"),
        (["model=PARENT", "recipe=[int8_weight_only,int4_awq]"], "quantize last, and once"),
        (["model=PARENT", "recipe=[heal,int8_weight_only]"], "recipe=heal+int8_weight_only: "),
        (["model=PARENT", "recipe=prune_wanda", "target=torchao"], "use target=huggingface"),
        (["model=PARENT", "recipe=prune_wanda", "recipe.prune_wanda.sparsity=nan"], "sparsity"),
        (["model=PARENT", "calibration.num_samples=0"], "calibration.num_samples=0"),
        (["model=PARENT", "seed=-1"], "seed=-1"),
        (["model=PARENT", "foo=1"], "foo"),
        (["model="], "there is no such folder"),
        (["model=PARENT", "data.max_seq_len=0"], "data.max_seq_len=0: must be above 0"),
        (["model=PARENT", "evaluation.prompt_tokens=999"], "the model has 256 positions"),
        (["model=PARENT", "data.max_seq_len=300"], "data.max_seq_len=300: the model has 256"),
        (["model=PARENT", "layers.include=[]"], "layers.include=[]: chooses no layer"),
        (["model=PARENT", "recipe=[prune_wanda,heal]", "recipe.heal.lr=inf"], "recipe.heal.lr=inf"),
        (
            [
                "model=PARENT",
                "recipe=mixed",
                "recipe.mixed.group_size=32",
                "recipe.mixed.budget_bits=nan",
            ],
            "recipe.mixed.budget_bits=nan",
        ),
        (["model=PARENT", "data.path=/nope"], "/nope"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, said, compress, parent, tmp_path):
    words = [word.replace("PARENT", str(parent)) for word in words]
    code, out, err = compress(*words, "out=x")
    lines = [line for line in err.splitlines() if not line.startswith("preparing")]
    assert code == 2 and len(lines) == 1 and said in lines[0], err
    assert out == "" and not (tmp_path / "x").exists()


def test_a_quantized_model_is_refused(compress, rounded):
    code, _, err = compress(f"model={rounded}", "out=y")
    assert code == 2 and "is quantized already (compressed-tensors)" in err


def test_weights_that_are_no_numbers_are_refused(compress, tmp_path):
    model = save_model(tmp_path / "broken")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    code, _, err = compress(f"model={tmp_path / 'broken'}", "out=new/x")
    assert code == 2 and "layers.1.mlp.up_proj.weight is NaN" in err
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    assert compress(f"model={tmp_path / 'broken'}", "out=mine/x")[0] == 2
    assert not any((tmp_path / "mine").iterdir())


def test_infinite_weights_are_refused_before_any_work(compress, tmp_path):
    model = save_model(tmp_path / "broken")
    model.lm_head.weight.data[3, 3] = float("-inf")
    model.save_pretrained(tmp_path / "broken")
    code, _, err = compress(f"model={tmp_path / 'broken'}", "out=x")
    assert code == 2 and err.count("\n") == 1, err
    assert "NaN or infinite in places" in err and not (tmp_path / "x").exists()


def test_two_commands_do_not_share_a_folder(compress, parent, tmp_path):
    (tmp_path / "x").mkdir()
    words = [f"model={parent}", "evaluation.speed=false", "out=x"]
    with held(tmp_path / "x"):
        code, _, err = compress(*words)
        assert code == 2 and "another command works in it; wait for that one" in err
    assert compress(*words)[0] == 0
    folder = tmp_path / "x" / "compressed_tensors"
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_memory_is_what_is_held_while_it_runs(compress, parent, tmp_path):
    words = [f"model={parent}", "recipe=int8_weight_only", "dtype=float32"]
    held = {}
    for target in ("compressed_tensors", "torchao"):
        code, _, err = compress(*words, f"target={target}", f"out={target}")
        assert code == 0, err
        report = read_report(tmp_path / target / target)
        held[target] = report["speed"]["child"]["memory_bytes"]
        parent_bytes = report["speed"]["parent"]["memory_bytes"]
    # transformers unpacks compressed-tensors before the first token; torchao's stay as they are.
    assert held["compressed_tensors"] >= parent_bytes
    assert held["torchao"] < 0.6 * parent_bytes


def test_a_file_that_was_cut_off_is_refused(compress, tmp_path):
    save_model(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = compress(f"model={tmp_path / 'cut'}", "out=x")
    assert code == 2 and err.count("\n") == 1 and "model.safetensors cannot be read" in err


def test_a_place_that_cannot_be_written_is_refused(compress, parent, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = compress(f"model={parent}", "out=file/x")
    assert code == 2 and "choose a folder that can be written" in err


@pytest.mark.long
def test_what_another_recipe_left_is_not_replaced(compress, parent, tmp_path):
    assert compress(f"model={parent}", "evaluation.speed=false", "out=x")[0] == 0
    assert compress(f"model={parent}", "evaluation.speed=false", "out=x")[0] == 0
    code, _, err = compress(f"model={parent}", "recipe=prune_wanda", "out=x")
    assert code == 2 and err.startswith("out=") and "int8_weight_only" in err


def test_a_stop_is_heard_while_models_are_compared(compress, parent, tmp_path, monkeypatch):
    done = tmp_path / "x/.work/result/rest.safetensors"
    monkeypatch.setattr("compression.__main__._stop_requested", done.exists)
    code, _, err = compress(f"model={parent}", "evaluation.speed=false", "out=x")
    assert code == 33 and "stopped while evaluating" in err
    monkeypatch.setattr("compression.__main__._stop_requested", lambda: False)
    assert compress(f"model={parent}", "evaluation.speed=false", "out=x")[0] == 0


def test_a_folder_that_holds_something_else_is_left_alone(compress, parent, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("precious")
    code, _, err = compress(f"model={parent}", "out=x")
    assert code == 2 and err.startswith("out=") and "mine.txt" in err
    assert (tmp_path / "x" / "mine.txt").read_text() == "precious"


def test_what_was_made_of_another_model_is_not_replaced(tmp_path):
    parents = [tmp_path / name for name in ("one", "other", "moved")]
    for parent, text in zip(parents, ("one", "other", "one"), strict=True):
        parent.mkdir()
        (parent / "model.safetensors").write_text(text)
    digest = hashlib.sha256(b"one").hexdigest()
    made_of = {"path": str(parents[0]), "files": {"model.safetensors": digest}}
    artifact = tmp_path / "out" / "torchao"
    artifact.mkdir(parents=True)
    (artifact / "compression.json").write_text('{"recipe": "int8_weight_only"}')
    (artifact / "lineage.json").write_text(json.dumps({"parent": made_of}))
    for same in (parents[0], parents[2]):
        check_replaceable(tmp_path / "out", "int8_weight_only", same)
    with pytest.raises(ConfigError, match="^out="):
        check_replaceable(tmp_path / "out", "int8_weight_only", parents[1])
