"""A run that was begun before documents had a BOS goes on without, though `auto` would add one."""

import dataclasses
import json

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from parallel.world import join_world
from tests.trainer.small_config import small_config
from tests.trainer.test_order_of_runs import change_state
from trainer.checkpoint import committed, read_state
from trainer.data.tokenizer import train_tokenizer
from trainer.evaluation import prompt_ids
from trainer.resume import stored_config


@pytest.fixture
def with_bos(tmp_path):
    backend = train_tokenizer(["a few words, and some more of them"] * 9, 290).backend_tokenizer
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    return small_config(folder, f"run.dir={folder}/run", f"checkpoint.upload=file://{folder}/store")


def test_a_prompt_begins_as_documents_do(with_bos, config):
    evaluation = dataclasses.replace(config.evaluation, sample_prompt="a few")
    config = dataclasses.replace(config, evaluation=evaluation)
    plain = with_bos.encode("a few", add_special_tokens=False)
    bos = with_bos.bos_token_id
    for add_bos, wanted in ((False, plain), (True, [bos, *plain])):
        data = dataclasses.replace(config.data, add_bos=add_bos)
        assert prompt_ids(dataclasses.replace(config, data=data), with_bos) == wanted
    spelled = dataclasses.replace(config.evaluation, sample_prompt="<bos>a few")
    assert (
        prompt_ids(dataclasses.replace(config, data=data, evaluation=spelled), with_bos) == wanted
    )


def test_settings_are_found_on_disk_and_in_the_store(config):
    place = config.run_dir.parent
    for folder, add_bos in (("run/checkpoints", True), ("store", False)):
        checkpoint = place / folder / "step-00000001"
        checkpoint.mkdir(parents=True)
        state = json.dumps({"config": {"data": {"add_bos": add_bos}}})
        (checkpoint / "trainer.json").write_text(state)
        (checkpoint / "manifest.json").write_text("{}")
    run = dataclasses.replace(config.run, dir=str(place / "new"))
    elsewhere = dataclasses.replace(config, run=run)
    alone = dataclasses.replace(config.checkpoint, upload=None)
    with join_world() as world:
        assert stored_config(config, world)["data"]["add_bos"] is True
        assert stored_config(elsewhere, world)["data"]["add_bos"] is False
        assert stored_config(dataclasses.replace(elsewhere, resume="never"), world) is None
        assert stored_config(dataclasses.replace(elsewhere, checkpoint=alone), world) is None


@pytest.mark.long
def test_a_run_begun_before_goes_on_with_its_data(trainer, small, with_bos, tmp_path):
    run = tmp_path / "run"
    words = [word for word in small if not word.startswith(("stop", "data.tokenizer_vocab"))]
    words += [f"data.tokenizer={tmp_path}/tokenizer", "schedule=constant"]
    words += ["export.at_end=false", "monitoring.report=false"]
    assert trainer(*words, "stop.steps=1", "data.add_bos=false").code == 0
    stored = read_state(committed(run / "checkpoints")[0])
    assert stored.config["data"]["add_bos"] is False

    change_state(
        committed(run / "checkpoints")[0], lambda state: state["config"]["data"].pop("add_bos")
    )
    for steps in (2, 3):  # and it is still known at the second start
        assert trainer(*words, f"stop.steps={steps}").code == 0
        state = read_state(committed(run / "checkpoints")[0])
        assert state.step == steps and state.data_digest == stored.data_digest
        assert "add_bos" not in state.config["data"]
    for given in ("true", "auto"):  # which is true, of this tokenizer
        refused = trainer(*words, "stop.steps=4", f"data.add_bos={given}")
        assert refused.code == 2
        rule = "data.add_bos=True: the checkpoint at step 3 was trained with False"
        assert rule in refused.err

    new = [f"run.dir={tmp_path}/new" if word.startswith("run.dir=") else word for word in words]
    assert trainer(*new, "stop.steps=1").code == 0
    state = read_state(committed(tmp_path / "new" / "checkpoints")[0])
    assert state.config["data"]["add_bos"] is True and state.data_digest != stored.data_digest
    changed = ["stop.steps=2", "data.add_bos=false", "allow_changes=[data.add_bos]"]
    assert trainer(*new, *changed).code == 0, "its digest follows from it"
