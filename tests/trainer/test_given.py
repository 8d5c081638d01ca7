"""What a user sets on a resume is heeded or refused: an `auto` in words is not the default."""

import copy

import pytest

from core.errors import ConfigError
from tests.trainer.test_probe import build, config_of, on_one_rank
from trainer.checkpoint import committed, read_state
from trainer.resume import keep_what_was_found
from trainer.settle import settle

NEW = {"model": {"fused_loss": "auto"}, "optim": {"decay": "auto"}}


@pytest.mark.parametrize("saved", ["matrices", "auto", None])
def test_an_auto_that_was_given_is_kept(saved):
    before = {"model": {"fused_loss": False}, "optim": {} if saved is None else {"decay": saved}}
    default, wished = copy.deepcopy(NEW), copy.deepcopy(NEW)
    keep_what_was_found(default, before, given=())
    assert default == before
    keep_what_was_found(wished, before, given={"optim.decay", "model.fused_loss"})
    assert wished == NEW


def test_an_asked_for_loss_that_is_another_is_refused():
    capped = build("gemma2", head_dim=8)
    before = {"model": {"fused_loss": True}, "data": {"mask_documents": False}}
    config = config_of(mask_documents=False)
    with on_one_rank(capped) as (module, strategy, world):
        arguments = (config, module, strategy, world)
        given = {"model.fused_loss"}
        config.allow_changes = []
        with pytest.raises(ConfigError, match="model.fused_loss=auto: the checkpoint was trained"):
            settle(*arguments, {"model": {}}, before, print, given)
        config.allow_changes = ["model.fused_loss"]
        resolved = {"model": {}}
        settle(*arguments, resolved, before, print, given)
        assert resolved["model"]["fused_loss"] is module.fused is False


@pytest.mark.long
def test_what_is_given_differs_from_the_checkpoint(trainer, small, tmp_path):
    words = [*small, "schedule=constant", "export.at_end=false", "evaluation.sample_prompt=null"]

    def stored():
        return read_state(committed(tmp_path / "run" / "checkpoints")[0]).config["optim"]["decay"]

    assert trainer(*words, "stop.steps=1", "optim.decay=matrices").code == 0
    assert trainer(*words, "stop.steps=2").code == 0 and stored() == "matrices"
    refused = trainer(*words, "stop.steps=3", "optim.decay=auto")
    assert refused.code == 2
    assert "optim.decay=auto: the checkpoint at step 2 was trained with matrices" in refused.err
    allowed = trainer(*words, "stop.steps=3", "optim.decay=auto", "allow_changes=[optim.decay]")
    assert allowed.code == 0 and stored() == "auto"
    behind = trainer(*words, "stop.steps=2")
    assert behind.code == 0 and "step 3 is beyond the 2 requested steps" in behind.out


@pytest.mark.long
@pytest.mark.parametrize(
    "change", ["data.parse_special_tokens=true", "data.validation_fraction=.3"]
)
def test_a_change_of_data_allows_what_follows_from_it(trainer, small, change):
    words = [*small, "schedule=constant", "export.at_end=false", "evaluation.sample_prompt=null"]
    key = change.partition("=")[0]
    assert trainer(*words, "stop.steps=1").code == 0
    for allowed in ([], ["allow_changes=[data.max_seq_len]"]):
        assert trainer(*words, "stop.steps=2", change, *allowed).code == 2
    assert trainer(*words, "stop.steps=2", change, f"allow_changes=[{key}]").code == 0
