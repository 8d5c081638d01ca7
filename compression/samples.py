"""Samples of token ids to calibrate with and to compare on, from any data of the trainer.

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
from compression.config import AUTO, CompressionConfig
from compression.generated import generate_samples
from core import layout
from core.errors import ConfigError
from trainer.data.config import DataConfig, MixtureDataConfig, PreparationConfig, SingleDataConfig
from trainer.data.loader import TrainLoader, validation_batches
from trainer.data.prepare import PreparedData, prepare

_SAMPLE_KEY = "calibration.max_seq_len"
_SAMPLE_TOKENS = 512  # length of conversations and generated text for max_seq_len=auto
_WINDOW = 64  # number of consecutive tokens that different texts do not share by chance
_MOST_SHARED = 0.05  # share of windows that may be common, such as licences and headings


@dataclass(frozen=True)
class Samples:
    """Samples for the calibration of methods and for the comparison of parent and child.

    Attributes:
        calibration: Token ids (N, T) int64.
        evaluation: Token ids (N, T) int64, of texts that are not in the calibration.
        digest: Digest of the data.
    """

    calibration: Tensor
    evaluation: Tensor
    digest: str


def draw_samples(
    config: CompressionConfig, model: Path, stop_requested: Callable[[], bool]
) -> Samples:
    """Prepares the data as the trainer does, with the model's tokenizer, and returns samples.

    Calibration samples come from the training split, in the trainer's seeded order; evaluation
    samples come from the held-out documents. `calibration.messages` replaces both; if there is no
    data, the model generates both.

    Args:
        config: Settings of the compression.
        model: Folder of the parent.
        stop_requested: Function that is polled.

    Raises:
        ConfigError: Data is missing or too small, the two kinds of samples share text, or a sample
            is longer than the model's positions.
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
    max_seq_len = sample_tokens(config, model)
    samples = read_samples(Path(path), model, sizes, max_seq_len, config.seed)
    _check_window(_SAMPLE_KEY, max_seq_len, model)
    calibration, evaluation = samples
    _check_tokens(config, *calibration.shape)
    check_no_overlap(calibration, evaluation, KEY)
    digest = hashlib.sha256(torch.cat(samples).numpy().tobytes()).hexdigest()
    return Samples(calibration, evaluation, f"messages:{digest}")


def _generated(
    config: CompressionConfig, model: Path, stop_requested: Callable[[], bool]
) -> Samples:
    sizes = config.calibration.num_samples, config.evaluation.num_samples
    max_seq_len = sample_tokens(config, model)
    _check_window(_SAMPLE_KEY, max_seq_len, model)
    _check_tokens(config, sizes[0], max_seq_len)
    settings = max_seq_len, config.seed, stop_requested
    samples = generate_samples(model, sum(sizes), *settings)
    calibration, evaluation = samples.split(sizes)
    check_no_overlap(calibration, evaluation)
    digest = hashlib.sha256(samples.numpy().tobytes()).hexdigest()
    return Samples(calibration, evaluation, f"generated:{digest}")


def sample_tokens(config: CompressionConfig, model: Path) -> int:
    """Returns the tokens of a sample of conversations or generated text; resolves auto."""
    asked = config.calibration.max_seq_len
    if asked != AUTO:
        return int(asked)
    longest = window_of(model)
    resolved = min(_SAMPLE_TOKENS, longest or _SAMPLE_TOKENS)
    has = "no limit" if longest is None else longest
    print(f"{_SAMPLE_KEY}={resolved}: auto, by the model's positions ({has})")
    return resolved


def _check_window(key: str, max_seq_len: int, model: Path) -> None:
    """Raises ConfigError for samples of more tokens than the model has positions."""
    longest = window_of(model)
    if longest is not None and max_seq_len > longest:
        rule = f"the model has {longest} positions"
        raise ConfigError(key, max_seq_len, rule, f"set {key}={longest}, or less")


def window_of(model: Path) -> int | None:
    """Returns the number of a model's positions; None if there is no limit."""
    config: Any = AutoConfig.from_pretrained(model).get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # MPT's is the latter
    found = (getattr(config, name, None) for name in names)
    return next((int(size) for size in found if size is not None), None)


def data_config(config: CompressionConfig) -> DataConfig:
    """Returns the data of the command line, or else the data of the run.

    Raises:
        ConfigError: There is neither.
    """
    if config.data is not None:
        data: DataConfig = config.data
        return data
    if config.parent.run is None:
        rule = "there is no text to train on"
        raise ConfigError("data", "null", rule, "give data=text data.path=notes.txt")
    saved: Any = OmegaConf.load(find_trained(config.parent.run) / layout.CONFIG)
    schema = MixtureDataConfig if "sources" in saved.data else SingleDataConfig
    found: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), saved.data))
    if "add_bos" not in saved.data:  # a run from before `add_bos` existed, which added none
        found.add_bos = False
    # The tokenizer is the export's own, wherever the run had it from.
    vocab_size = PreparationConfig.tokenizer_vocab_size
    run_data: DataConfig = dataclasses.replace(
        found, tokenizer="auto", tokenizer_vocab_size=vocab_size
    )
    return run_data


def check_no_overlap(calibration: Tensor, evaluation: Tensor, key: str = "data") -> None:
    """Raises ConfigError if evaluation samples share text with the calibration.

    Args:
        calibration: Token ids (N, T).
        evaluation: Token ids (M, T).
        key: Key of the data, for errors.
    """
    size = min(_WINDOW, calibration.shape[1])
    # Every window of the calibration, but only disjoint ones of the evaluation: a shared text is
    # found at any offset.
    seen = {tuple(w) for row in calibration for w in row.unfold(0, size, 1).tolist()}
    windows = [tuple(w) for row in evaluation for w in row.unfold(0, size, size).tolist()]
    shared = sum(window in seen for window in windows) / max(1, len(windows))
    if shared > _MOST_SHARED:
        raise ConfigError(
            key,
            f"{shared:.0%} shared",
            f"this share of the held-out text is also in the calibration, {size} tokens in a row",
            "remove repeated documents from the data",
        )


def _calibration(
    config: CompressionConfig, prepared: PreparedData, max_seq_len: int, mask_documents: bool
) -> Tensor:
    num_samples = config.calibration.num_samples
    available = sum((dataset.num_tokens - 1) // max_seq_len for dataset in prepared.sources)
    num_samples = min(num_samples, available)  # a second epoch would add no information
    _check_tokens(config, num_samples, max_seq_len)
    # One batch that holds all samples: they are the first ones of the trainer's order.
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
            f"the calibration has {num_samples * max_seq_len} tokens, in {num_samples} "
            f"samples of {max_seq_len}",
            "add data, raise calibration.num_samples, or lower calibration.min_tokens",
        )
