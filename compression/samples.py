"""Token ids to calibrate with and to compare on, from any data of the trainer.

Shapes: N samples of T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoConfig

from compression.artifact import find_trained
from compression.chat import KEY, read_samples
from compression.config import CompressionConfig
from compression.generated import generate_samples
from core.errors import ConfigError
from trainer.data.config import DataConfig, MixtureDataConfig, PreparationConfig, SingleDataConfig
from trainer.data.loader import TrainLoader, validation_batches
from trainer.data.prepare import PreparedData, prepare

_WINDOW = 64  # tokens in a row that two texts do not share by chance
_MOST_SHARED = 0.05  # what licences and headings may


@dataclass(frozen=True)
class Samples:
    """What is shown to methods, and what parent and child are compared on.

    Attributes:
        calibration: (N, T) int64.
        evaluation: (N, T) int64; no text of it is in the calibration.
        digest: Of the prepared data.
    """

    calibration: Tensor
    evaluation: Tensor
    digest: str


def draw_samples(
    config: CompressionConfig, model: Path, stop_requested: Callable[[], bool]
) -> Samples:
    """Prepares the data as the trainer does, with the model's tokenizer, and draws samples.

    Calibration comes from the training split, in the trainer's seeded order; evaluation from the
    documents that are held out of it. `calibration.messages` takes the place of both; without
    data, the model makes both itself.

    Args:
        config: Of the compression; `data` or a `run` with data.
        model: Folder of the parent.
        stop_requested: Polled.

    Raises:
        ConfigError: There is no data, too little, the two share text, or a sample is longer than
            the model's window.
    """
    if config.calibration.messages is not None:
        return _conversations(config, config.calibration.messages, model)
    if config.data is None and config.parent.run is None:
        return _generated(config, model, stop_requested)
    data = data_config(config)
    _check_window("data.max_seq_len", data.max_seq_len, model)
    prepared = prepare(data, model_path=str(model), stop_requested=stop_requested)
    max_seq_len = data.max_seq_len
    calibration = _calibration(config, prepared, max_seq_len, data.mask_documents)
    evaluation = torch.cat(
        [
            batch.input_ids
            for batch in validation_batches(
                prepared,
                max_seq_len=max_seq_len,
                mask_documents=False,
                batch_size=1,
                rank=0,
                world_size=1,
                max_samples=config.evaluation.num_samples,
            )
        ]
    )
    check_no_overlap(calibration, evaluation)
    return Samples(calibration, evaluation, prepared.digest)


def _conversations(config: CompressionConfig, path: str, model: Path) -> Samples:
    sizes = config.calibration.num_samples, config.evaluation.num_samples
    max_seq_len = config.calibration.max_seq_len
    samples = read_samples(Path(path), model, sizes, max_seq_len, config.seed)
    _check_window("calibration.max_seq_len", max_seq_len, model)
    calibration, evaluation = samples
    _check_tokens(config, *calibration.shape)
    check_no_overlap(calibration, evaluation, KEY)
    digest = hashlib.sha256(torch.cat(samples).numpy().tobytes()).hexdigest()
    return Samples(calibration, evaluation, f"messages:{digest}")


def _generated(
    config: CompressionConfig, model: Path, stop_requested: Callable[[], bool]
) -> Samples:
    sizes = config.calibration.num_samples, config.evaluation.num_samples
    _check_window("calibration.max_seq_len", config.calibration.max_seq_len, model)
    _check_tokens(config, sizes[0], config.calibration.max_seq_len)
    settings = config.calibration.max_seq_len, config.seed, stop_requested
    samples = generate_samples(model, sum(sizes), *settings)
    calibration, evaluation = samples.split(sizes)
    check_no_overlap(calibration, evaluation)
    digest = hashlib.sha256(samples.numpy().tobytes()).hexdigest()
    return Samples(calibration, evaluation, f"generated:{digest}")


def _check_window(key: str, max_seq_len: int, model: Path) -> None:
    """Refuses samples of more tokens than the model has positions for."""
    longest = window_of(model)
    if longest is not None and max_seq_len > longest:
        rule = f"the model has {longest} positions"
        raise ConfigError(key, max_seq_len, rule, f"set {key}={longest}, or less")


def window_of(model: Path) -> int | None:
    """Positions that a model has; None where there is no limit."""
    config: Any = AutoConfig.from_pretrained(model).get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # MPT's is the latter
    found = (getattr(config, name, None) for name in names)
    return next((int(size) for size in found if size is not None), None)


def data_config(config: CompressionConfig) -> DataConfig:
    """The data of the command line, else of the run."""
    if config.data is not None:
        data: DataConfig = config.data
        return data
    if config.parent.run is None:
        rule = "there is no text to train on"
        raise ConfigError("data", "null", rule, "give data=text data.path=notes.txt, or the like")
    saved: Any = OmegaConf.load(find_trained(config.parent.run) / "config.yaml")
    schema = MixtureDataConfig if "sources" in saved.data else SingleDataConfig
    found: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), saved.data))
    if "add_bos" not in saved.data:  # a run that was begun before there was the choice
        found.add_bos = False
    # The tokenizer is the export's own, however it was come by.
    vocab_size = PreparationConfig.tokenizer_vocab_size
    run_data: DataConfig = dataclasses.replace(
        found, tokenizer="auto", tokenizer_vocab_size=vocab_size
    )
    return run_data


def check_no_overlap(calibration: Tensor, evaluation: Tensor, key: str = "data") -> None:
    """Raises ConfigError where text to compare on was calibrated with.

    Args:
        calibration: (N, T).
        evaluation: (M, T).
        key: Where both come from.
    """
    size = min(_WINDOW, calibration.shape[1])
    seen = {tuple(w) for row in calibration for w in row.unfold(0, size, 1).tolist()}
    windows = [tuple(w) for row in evaluation for w in row.unfold(0, size, size).tolist()]
    shared = sum(window in seen for window in windows) / max(1, len(windows))
    if shared > _MOST_SHARED:
        raise ConfigError(
            key,
            f"{shared:.0%} shared",
            f"that much of the held-out text is in the calibration, {size} tokens in a row",
            "remove repeated documents from the data",
        )


def _calibration(
    config: CompressionConfig, prepared: PreparedData, max_seq_len: int, mask_documents: bool
) -> Tensor:
    num_samples = config.calibration.num_samples
    available = sum((dataset.num_tokens - 1) // max_seq_len for dataset in prepared.sources)
    num_samples = min(num_samples, available)  # a second epoch would teach nothing
    _check_tokens(config, num_samples, max_seq_len)
    with TrainLoader(
        prepared,
        max_seq_len=max_seq_len,
        mask_documents=mask_documents,
        seed=config.seed,
        global_batch_size=num_samples,
        micro_batch_size=1,
        rank=0,
        world_size=1,
        first_sample=0,
        pin=False,
    ) as loader:
        return torch.cat([batch.input_ids for batch in next(loader)])


def _check_tokens(config: CompressionConfig, num_samples: int, max_seq_len: int) -> None:
    if config.needs_data and num_samples * max_seq_len < config.calibration.min_tokens:
        raise ConfigError(
            "calibration.min_tokens",
            config.calibration.min_tokens,
            f"there are {num_samples * max_seq_len} tokens to calibrate with, in {num_samples} "
            f"samples of {max_seq_len}",
            "add data, raise calibration.num_samples, or lower calibration.min_tokens",
        )
