"""Recipes as Hydra composes them; nothing of it needs torch."""

import subprocess
import sys

import pytest

from compression.__main__ import main
from compression.command import COMPRESSION
from compression.config import CompressionConfig, Target
from core.errors import ConfigError
from core.settings.command import CONFIG_DIR
from tests.compression.test_samples import settings

RECIPES = sorted(path.stem for path in (CONFIG_DIR / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_built(recipe):
    words = ["parent.model=x", f"recipe={recipe}"]
    if recipe == "heal":  # never the first
        words[1] = "recipe=[prune_wanda,heal]"
    config = settings(*words)
    assert isinstance(config, CompressionConfig) and recipe in config.recipe


def test_steps_keep_the_order_in_which_they_are_named():
    for steps in (["prune_wanda", "int4_gptq"], ["int4_gptq", "prune_wanda"]):
        tree = COMPRESSION.compose_tree([f"recipe=[{','.join(steps)}]"])
        assert list(tree.recipe) == steps


def test_the_target_follows_from_the_recipe_unless_it_is_named():
    assert settings("recipe=int4_awq").targets == [Target.compressed_tensors]
    assert settings("recipe=prune_wanda").targets == [Target.huggingface]
    both = settings("target=[gguf,compressed_tensors,gguf]", "dtype=float32").targets
    assert both == [Target.gguf, Target.compressed_tensors]
    with pytest.raises(ConfigError, match="target=nope: is no target; there are: huggingface"):
        settings("target=nope")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--nope", "option=--nope: there is no such option"),
        ("--cfg=nope", "--cfg=nope: is none of job, hydra, all"),
        ("--config-dir", "--config-dir=: "),
        ("layers.exclude=['*.down_proj]", "layers.exclude=['*.down_proj]: cannot be read"),
        ("recipe=[a", "recipe=[a: cannot be read"),
        ("x", "word=x: is no key=value"),
    ],
)
def test_words_that_cannot_be_read_are_refused_in_one_line(word, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compression", "model=x", word])
    code = main()
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith(said), err


def test_help_comes_at_once_and_composing_needs_no_torch():
    code = (
        "import sys\n"
        "sys.argv = ['compression', '--cfg', 'job', 'model=x', 'recipe=int4_gptq']\n"
        "import compression.__main__ as m\n"
        "m.main()\n"
        "import tqdm\n"
        "assert tqdm.tqdm([1]).disable; print('no bars')\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "group_size: 128" in done.stdout and "model: x" in done.stdout
    assert "no bars" in done.stdout
    help_ = [sys.executable, "-m", "compression", "--help"]
    done = subprocess.run(help_, capture_output=True, text=True)
    assert all(recipe in done.stdout for recipe in RECIPES) and done.returncode == 0
