"""Every option composes into the typed tree, and resolved configs change only on purpose.

The resolved configs are compared with `tests/golden/config-<name>.yaml`. After a change that is
meant, `python -m tests.trainer.test_config` rewrites them (in a commit of its own).
"""

import dataclasses
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core.settings.command import CONFIG_DIR
from core.settings.stored import from_yaml, to_yaml
from trainer.command import TRAINER
from trainer.config import StopConfig, TrainerConfig
from trainer.data.config import SingleDataConfig
from trainer.model_config import NamedModelConfig, PathModelConfig

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
FILES = sorted(CONFIG_DIR.rglob("*.yaml"))
OPTIONS = sorted(
    (p.parent.name, p.stem)
    for p in CONFIG_DIR.glob("*/*.yaml")
    if p.parent.name not in ("launch", "recipe")  # other programs': see their tests
)
EXPERIMENTS = [name for group, name in OPTIONS if group == "experiment"]

# Values for the keys that an option leaves to the user.
MANDATORY = {
    ("model", "pretrained"): ["model.path=folder"],
    ("model", "config"): ["model.path=folder"],
    ("objective", "distill"): ["objective.teacher=folder"],
    **{("data", kind): ["data.path=x"] for kind in ("text", "jsonl", "parquet", "hub", "tokens")},
}


def compose_tree(*overrides):
    return TRAINER.compose_tree(overrides)


def resolved_yaml(name):
    """What `--cfg job --resolve` would print, less what depends on the machine."""
    tree = compose_tree(*([] if name == "default" else [f"experiment={name}"]))
    tree.data.cache_dir = "<cache>"
    return OmegaConf.to_yaml(tree, resolve=True)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda x: x)
def test_every_option_composes_and_converts(group, option):
    words = [f"{group}={option}", *MANDATORY.get((group, option), [])]
    config = TRAINER.compose(words)
    assert isinstance(config, TrainerConfig)
    for field in {group for group, _ in OPTIONS} - {"experiment"}:
        assert dataclasses.is_dataclass(getattr(config, field)), f"{field} is untyped"
    forgotten = OmegaConf.missing_keys(compose_tree(*words))
    assert forgotten == set(), "no mandatory value is forgotten"
    # Ranks that a supervisor starts are given the same settings.
    assert from_yaml(TRAINER, to_yaml(TRAINER, config, {"seed"})) == (config, {"seed"})


@pytest.mark.parametrize(("group", "option"), MANDATORY, ids=lambda x: x)
def test_mandatory_values_have_no_default(trainer, tmp_path, group, option):
    result = trainer(f"{group}={option}", f"run.dir={tmp_path / 'run'}")
    assert result.code == 2
    [value] = MANDATORY[group, option]
    assert result.err.startswith(value.split("=")[0]), result.err
    assert result.err.count("\n") == 1, result.err


@pytest.mark.parametrize("name", ["default", *EXPERIMENTS])
def test_resolved_config_is_the_golden_one(name):
    golden = GOLDEN / f"config-{name}.yaml"
    assert golden.exists(), "run `python -m tests.trainer.test_config`"
    assert resolved_yaml(name) == golden.read_text()


def test_no_golden_config_is_left_over():
    assert {p.stem for p in GOLDEN.glob("config-*.yaml")} == {
        f"config-{name}" for name in ("default", *EXPERIMENTS)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIG_DIR)))
def test_every_file_says_what_it_is_for(path):
    comments = [x for x in path.read_text().splitlines() if not x.startswith("# @package")]
    assert re.match(r"# \S+ \S+", comments[0]), "begin with a comment"


def test_help_lists_every_option(trainer):
    result = trainer("--help")
    assert result.code == 0
    groups = result.out.partition("Groups (group=option):\n")[2].partition("\n\n")[0]
    listed = {line.split()[0]: line.split()[1:] for line in groups.splitlines()}
    for group, option in OPTIONS:
        assert option in listed[group], f"{group}={option} is not in --help"


@pytest.mark.parametrize("program", ["trainer", "trainer.export"])
def test_help_imports_no_heavy_library(program):
    code = f"""
import contextlib, runpy, sys
sys.argv = ["", "--help"]
with contextlib.suppress(SystemExit):
    runpy.run_module({program!r}, run_name="__main__", alter_sys=True)
heavy = {{"torch", "transformers", "datasets", "numpy", "deepspeed", "wandb", "matplotlib"}}
sys.exit(" ".join(heavy & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == "\n", f"imported: {result.stderr}"
    assert "Exit codes: " in result.stdout


@pytest.fixture
def config_dir(tmp_path, monkeypatch):
    """A user's own options, in the working directory, which is not the repository."""
    folder = tmp_path / "mine"
    (folder / "experiment").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /parallel: zero\n  - override /model: small\n"
        "global_batch_size: 24\nparallel:\n  stage: 3\n"
    )
    (folder / "model" / "small.yaml").write_text(
        "defaults: [/schema/model/named@_here_]\nmodel_type: gpt2\nconfig:\n  n_layer: 2\n"
    )
    monkeypatch.chdir(tmp_path)
    return Path("mine")


def test_options_of_the_users_own(trainer, config_dir):
    result = trainer("--config-dir", config_dir, "experiment=mine", "--cfg", "job")
    assert result.code == 0, result.err
    tree = OmegaConf.create(result.out)
    assert tree.global_batch_size == 24
    assert tree.parallel.stage == 3 and "offload_optimizer" in tree.parallel
    assert tree.model.model_type == "gpt2" and tree.model.config == {"n_layer": 2}
    assert tree.micro_batch_size == 8, "the rest is the trainer's"


@pytest.mark.parametrize("joined", [True, False])
def test_help_lists_options_of_the_users_own(trainer, config_dir, joined):
    flag = [f"--config-dir={config_dir}"] if joined else ["--config-dir", config_dir]
    result = trainer(*flag, "--help")
    assert result.code == 0
    assert re.search(r"^  experiment +mine \| stdlib$", result.out, re.MULTILINE)
    assert re.search(r"^  model .*\| small \|", result.out, re.MULTILINE)
    assert re.search(r"^  parallel +ddp \| fsdp \| zero$", result.out, re.MULTILINE)


def test_as_a_program_from_another_directory(config_dir, tmp_path):
    arguments = ["--config-dir", str(config_dir), "experiment=mine", "--cfg", "job"]
    result = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "global_batch_size: 24" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["mine"], "something was written"


def test_hydra_writes_nothing(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trainer("stop.steps=0").code == 2
    assert list(tmp_path.iterdir()) == []
    files = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    assert files == []


def config_of(**changes):
    settings = {
        "model": NamedModelConfig(model_type="llama"),
        "data": SingleDataConfig(max_seq_len=100),
    }
    return TrainerConfig(**settings | changes)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (StopConfig(steps=7), 7),
        (StopConfig(tokens=32_000), 10),
        (StopConfig(tokens=32_001), 11),  # at least as many tokens as were asked for
        (StopConfig(tokens=1), 1),
        (StopConfig(steps=7, tokens=32_000), 7),
        (StopConfig(steps=12, tokens=32_000), 10),
        (StopConfig(steps=12, tokens=32_000, minutes=1.0), 10),
        (StopConfig(minutes=1.0), None),
    ],
    ids=str,
)
def test_total_steps_is_the_smallest_limit(stop, expected):
    assert config_of(stop=stop, global_batch_size=32).total_steps == expected


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"), [(1, 8, 4), (2, 8, 2), (4, 8, 1), (2, 1, 16)]
)
def test_accumulation_follows_from_the_batch(world_size, micro, accumulation):
    config = config_of(global_batch_size=32, micro_batch_size=micro)
    assert config.grad_accum_steps(world_size) == accumulation


def test_run_dir_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TRAINER.compose(["run.name=mine"])
    assert config.run_dir == tmp_path / "runs" / "mine"


def test_pretrained_and_config_differ_by_their_weights():
    loaded, drawn = (
        TRAINER.compose([f"model={option}", "model.path=folder"]).model
        for option in ("pretrained", "config")
    )
    assert loaded == PathModelConfig(path="folder", weights=True)
    assert drawn == PathModelConfig(path="folder", weights=False)


@pytest.mark.parametrize(
    "name",
    ["/x/[a] b/é.txt", "~/notes (1).txt", "/x/{a}=b.txt", 'it\'s "so"\\.txt', "/é,b.txt", "\u65e5"],
)
def test_a_name_arrives_as_it_is_typed(name):
    assert compose_tree("data=text", f"data.path={name}").data.path == name
    assert compose_tree("data=mixture", f"data.sources.a.path={name}").data.sources.a.path == name


def test_home_is_found_behind_a_key(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = TRAINER.compose(["model=pretrained", "model.path=~/m", "data.tokenizer=~/t"])
    assert (config.model.path, config.data.tokenizer) == ("/home/me/m", "/home/me/t")


if __name__ == "__main__":
    for name in ("default", *EXPERIMENTS):
        (GOLDEN / f"config-{name}.yaml").write_text(resolved_yaml(name))
