"""Small sources and their preparation, shared by the tests of `trainer.data`."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from tests.trainer.data.samples import make_texts, write_folder
from trainer.data.config import DataConfig, SingleDataConfig, SourceKind
from trainer.data.prepare import PreparedData, prepare


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def texts() -> list[str]:
    return make_texts(120)


@pytest.fixture
def folder(tmp_path: Path, texts: list[str]) -> Path:
    return write_folder(tmp_path / "texts", texts)


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> Callable[..., SingleDataConfig]:
    """A configuration of the text folder; keywords change it."""

    def make(**changes: object) -> SingleDataConfig:
        settings: dict[str, object] = {
            "kind": SourceKind.text,
            "path": str(folder),
            "cache_dir": str(tmp_path / "cache"),
            "tokenizer_vocab_size": 300,
            "validation_fraction": 0.2,
        }
        return SingleDataConfig(**(settings | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture
def ready() -> Callable[[DataConfig], PreparedData]:
    """Prepare without a pretrained model, never told to stop."""
    return lambda cfg: prepare(cfg, model_path=None, stop_requested=lambda: False)
