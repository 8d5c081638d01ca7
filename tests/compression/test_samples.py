"""Text to calibrate with and to compare on."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from compression.samples import check_no_overlap, data_config, draw_samples
from compression.schemas import register_schemas
from monitoring.errors import ConfigError, Interrupted
from trainer.cli import CONFIG_DIR


def settings(*words):
    register_schemas()
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        return OmegaConf.to_object(compose("compression", list(words)))


def of_text(text, *words):
    return settings(
        "data=jsonl", f"data.path={text}", "data.column=text", "data.max_seq_len=32", *words
    )


def draw(parent, text, *words):
    return draw_samples(of_text(text, *words), parent, lambda: False)


def test_the_same_seed_draws_the_same(parent, text):
    words = ("calibration.num_samples=8", "calibration.min_tokens=100", "evaluation.num_samples=3")
    first, again = draw(parent, text, *words), draw(parent, text, *words)
    assert torch.equal(first.calibration, again.calibration)
    assert first.calibration.shape == (8, 32) and first.evaluation.shape == (3, 32)
    other = draw(parent, text, *words, "seed=1")
    assert not torch.equal(first.calibration, other.calibration)
    assert torch.equal(first.evaluation, other.evaluation)


def test_no_sample_comes_twice(parent, text):
    samples = draw(parent, text, "calibration.num_samples=100000", "calibration.min_tokens=100")
    rows = {tuple(row) for row in samples.calibration.tolist()}
    assert len(rows) == len(samples.calibration) < 1000


def test_too_little_is_refused(parent, text):
    with pytest.raises(ConfigError, match="calibration.min_tokens=4096.*add data"):
        draw(parent, text, "calibration.num_samples=4", "recipe=int4_gptq")
    draw(parent, text, "calibration.num_samples=4")  # which rounding does not look at


def test_text_to_compare_on_that_was_calibrated_with_is_refused():
    calibration = torch.randint(1000, (4, 256), generator=torch.Generator().manual_seed(0))
    evaluation = torch.randint(1000, (4, 256), generator=torch.Generator().manual_seed(1))
    check_no_overlap(calibration, evaluation)
    evaluation[2] = calibration[1].roll(100)
    with pytest.raises(ConfigError, match="25% shared|19% shared"):
        check_no_overlap(calibration, evaluation)


def test_without_data_the_model_makes_its_text(parent):
    words = [
        f"parent.model={parent}",
        "calibration.num_samples=18",
        "calibration.max_seq_len=24",
        "calibration.min_tokens=100",
        "evaluation.num_samples=3",
    ]
    first, again = (draw_samples(settings(*words), parent, lambda: False) for _ in range(2))
    assert first.calibration.shape == (18, 24) and first.evaluation.shape == (3, 24)
    assert torch.equal(first.calibration, again.calibration) and first.digest == again.digest
    assert len({tuple(row) for row in first.calibration.tolist()}) == 18
    other = draw_samples(settings(*words, "seed=1"), parent, lambda: False)
    assert not torch.equal(first.calibration, other.calibration)
    with pytest.raises(ConfigError, match="calibration.max_seq_len=512: the model has 256"):
        draw_samples(settings(f"parent.model={parent}"), parent, lambda: False)
    with pytest.raises(Interrupted):
        draw_samples(settings(*words), parent, lambda: True)


def test_there_is_no_healing_without_text():
    with pytest.raises(ConfigError, match="data=null: there is no text to train on"):
        data_config(settings("parent.model=x"))
