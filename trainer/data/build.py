"""Builds a token dataset from the documents of one source."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast

from core.errors import ConfigError
from trainer.data.config import PreparationConfig
from trainer.data.files import StopRequested, check_stop
from trainer.data.sources import Document, Source
from trainer.data.tokenizer import plain_backend, special_tokens
from trainer.data.writer import TokenDatasetWriter

BATCH_CHARS = 1 << 20
BATCH_DOCUMENTS = 1024


class Advance(Protocol):
    """Is called to report progress."""

    def __call__(self, num_documents: int, num_bytes: int) -> None: ...


def build_dataset(
    folder: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    cfg: PreparationConfig,
    add_bos: bool,
    transform: dict[str, object],
    stop_requested: StopRequested,
) -> None:
    """Tokenizes a source into an empty folder, with EOS and optionally BOS around each document.

    The tokenizer's own threads do the work; memory holds one batch of documents at a time.

    Raises:
        ConfigError: A split would have no documents, or the source cannot be read.
        Interrupted: A stop was requested.
    """
    # Without an explicit value the tokenizers library guesses, and warns when a process forks
    # later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend = plain_backend(tokenizer, cfg.parse_special_tokens)
    bos = tokenizer.bos_token_id if add_bos else None
    eos, parse = tokenizer.eos_token_id, cfg.parse_special_tokens
    special = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or r"(?!)")
    spelled: list[str] = []  # the first special token in each document that has one
    draws: list[float] = []  # the two lowest and the two highest distinct draws
    writer = TokenDatasetWriter(folder, tokenizer, shard_tokens=cfg.shard_tokens)
    # The size of compressed files or of files with other columns does not predict the text's size.
    total = source.size_bytes if source.identity["kind"] in ("stdlib", "text") else None
    with writer, progress(f"preparing {source.key}", total) as advance:
        for batch in batched(source.documents()):
            check_stop(stop_requested)
            texts = [document.text for document in batch]
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            num_bytes = [len(text.encode()) for text in texts]
            for document, encoding, size in zip(batch, encodings, num_bytes, strict=True):
                held_out = document.draw < cfg.validation_fraction
                split = "validation" if held_out else "train"
                writer.add(split, _framed(encoding.ids, bos, eos, parse), size)
            draws = sorted({*draws, *(document.draw for document in batch)})
            draws = [*draws[:2], *draws[max(2, len(draws) - 2) :]]
            spelled += [found.group() for found in map(special.search, texts) if found]
            advance(len(batch), sum(num_bytes))
        if spelled and not parse:
            source.notes.append(
                f"{len(spelled):,} documents spell special tokens such as {spelled[0]}, which are "
                "read as text; data.parse_special_tokens=true reads them as those tokens"
            )
        for note in source.notes:
            print(f"{source.key}: {note}", file=sys.stderr)
        _check_splits(source.key, writer, cfg.validation_fraction, draws)
        writer.finish(source.identity, transform)


def _framed(ids: list[int], bos: int | None, eos: int, parsed: bool) -> list[int]:
    """Returns a document with its BOS and EOS, without doubling those that its text spells."""
    begin = [] if bos is None or ids[:1] == [bos] else [bos]
    end = [] if parsed and ids[-1:] == [eos] else [eos]
    return [*begin, *ids, *end]


def batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Yields batches of documents that keep all threads busy but stay small in memory."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


@contextmanager
def progress(task: str, total_bytes: int | None) -> Iterator[Advance]:
    """Reports progress on stderr: a live bar on a terminal, else a first and a last line."""
    begin = time.monotonic()
    documents = size = 0

    def state() -> str:
        rate = size / 1e6 / max(time.monotonic() - begin, 1e-9)
        return f"{documents:,} documents, {size / 1e6:,.1f} MB, {rate:.1f} MB/s"

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        row = bar.add_task(task, total=total_bytes)
        if bar.disable:
            print(f"{task} ...", file=sys.stderr)

        def advance(num_documents: int, num_bytes: int) -> None:
            nonlocal documents, size
            documents, size = documents + num_documents, size + num_bytes
            bar.update(row, description=f"{task}: {state()}", completed=size)

        yield advance
        if bar.disable:
            print(f"{task}: {state()}", file=sys.stderr)


def _check_splits(
    key: str, writer: TokenDatasetWriter, fraction: float, draws: list[float]
) -> None:
    train, validation = writer.num_documents("train"), writer.num_documents("validation")
    if train + validation == 0:
        raise ConfigError(key, "", "none of its documents has any text", "give a source with text")
    if not train or not validation:
        empty = "validation" if train else "train"
        rule = f"of {train + validation} documents of {key} none is left for the {empty} split"
        fix = "add other documents (a text file of up to 64 KiB is one)"
        if len(draws) > 1:  # otherwise all are the same text, which no fraction can divide
            neighbours = draws[:2] if train else draws[-2:]
            fix = f"set data.validation_fraction={_between(*neighbours)}, or {fix}"
        else:
            rule += ", and all of them are the same text" if train + validation > 1 else ""
        raise ConfigError("data.validation_fraction", fraction, rule, fix)


def _between(low: float, high: float) -> str:
    """Returns the shortest decimal in (low, high]; both are 48-bit fractions in [0, 1)."""
    for digits in count(1):
        unit = Decimal(10) ** -digits
        found = (Decimal(low) // unit + 1) * unit
        if found <= Decimal(high):
            return f"{found:f}"
    raise AssertionError("unreachable: they differ")
