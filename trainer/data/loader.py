"""Samples to batches, without any state but a position in the stream.

Rank, world size and accumulation only choose which part of a step is read here, and any number of
ranks can share a step: its samples are dealt out as evenly as they can be.

Shapes: B rows of a micro-batch, T tokens in a sample, G samples in a step, A micro-batches in a
step. Documents that are computed apart lie in rows of their own, of L tokens, the longest's.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError
from trainer.data.order import OrderRule, SampleOrder
from trainer.data.prepare import PreparedData
from trainer.data.tokens import TokenDataset, Tokens

IGNORE_INDEX = -100
PADDING = -1  # sample id of a row that only fills a batch up
QUEUE_DEPTH = 2
POLL_S = 0.1


# Inputs, targets and positions of as many tokens: each (T,).
Row = tuple[Tokens, Tokens, Tokens]


@dataclass(frozen=True)
class Sample:
    """Tokens [index * T, index * T + T + 1) of a dataset.

    Attributes:
        dataset: Whose tokens they are.
        index: Which of its samples.
        number: Its place in the stream, or among those that are held out.
    """

    dataset: TokenDataset
    index: int
    number: int

    def row(self, max_seq_len: int, mask_documents: bool) -> Row:
        """Its inputs, targets and positions."""
        start = self.index * max_seq_len
        tokens = self.dataset.read(start, max_seq_len + 1)
        inputs, targets, positions = tokens[:-1], tokens[1:].copy(), np.arange(max_seq_len)
        if mask_documents:
            starts = self._starts(max_seq_len)
            targets[starts - 1] = IGNORE_INDEX
            begins = np.zeros(max_seq_len, np.int64)
            inside = starts[starts < max_seq_len]
            begins[inside] = inside
            positions = positions - np.maximum.accumulate(begins)
        return inputs, targets, positions

    def lengths(self, max_seq_len: int) -> list[int]:
        """Tokens of each document, or of what it has of it."""
        starts = self._starts(max_seq_len)
        borders = [0, *starts[starts < max_seq_len].tolist(), max_seq_len]
        return [end - start for start, end in itertools.pairwise(borders)]

    def _starts(self, max_seq_len: int) -> Tokens:
        """Where in it documents start, from 1 to T."""
        return self.dataset.document_starts(self.index * max_seq_len + 1, max_seq_len) + 1


@dataclass(frozen=True)
class Batch:
    """Rows of packed samples, or of documents apart.

    Attributes:
        input_ids: (B, T) int64.
        targets: (B, T) int64, the next token; IGNORE_INDEX where there is no loss.
        position_ids: (B, T) int64 from 0 at each document's start, if documents are masked and
            share rows; else None.
        attention_mask: (B, T) int64, 0 for what fills a row up behind its document, if each has a
            row of its own; else None.
        sample_ids: (B,) positions in the stream (training) or numbers of the sample (validation);
            PADDING for a row without loss that only fills the batch up.
        num_targets: Targets that are not IGNORE_INDEX.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    sample_ids: list[int]
    num_targets: int

    def inputs(self) -> dict[str, Tensor | None]:
        """What an objective is called with."""
        return {
            "input_ids": self.input_ids,
            "targets": self.targets,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
        }

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device; from pinned memory without waiting for the copy."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """Copy to page-locked memory, from which a GPU fetches on its own."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {
            name: None if tensor is None else move(tensor) for name, tensor in self.inputs().items()
        }
        return replace(self, **tensors)


class TrainLoader:
    """Endless iterator over steps: each `next` is this rank's micro-batches of one step.

    Sample ids of step s are [first_sample + s * G, first_sample + (s + 1) * G), dealt out by
    `split_step`. A thread reads ahead by two steps.

    Args:
        prepared: Data to read.
        max_seq_len: T.
        mask_documents: No target across a border of documents, positions from 0 in each.
        apart: Give each document, or what a sample has of it, a row of its own, for models that do
            not tell documents apart by positions; only with `mask_documents`. A micro-batch is then
            as many batches as it takes for none to hold more than B * T tokens.
        seed: Of the order.
        global_batch_size: G, of all ranks and micro-batches.
        micro_batch_size: B, at most.
        rank: Of this process among those that read different data.
        world_size: Number of those.
        first_sample: Where to start: the number of samples that training has seen.
        pin: Return page-locked tensors (CUDA only).
        order: How the weights of a mixture are counted.

    Raises:
        ConfigError: A source too small for one sample, or a weight too small.
    """

    def __init__(
        self,
        prepared: PreparedData,
        *,
        max_seq_len: int,
        mask_documents: bool,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        first_sample: int,
        pin: bool,
        order: OrderRule = OrderRule.exact,
        apart: bool = False,
    ) -> None:
        self._datasets, self._max_seq_len = prepared.sources, max_seq_len
        self._mask_documents, self._apart, self._pin = mask_documents, apart, pin
        self._global_batch_size, self._next_sample = global_batch_size, first_sample
        self._micro_batch_size, self._rank = micro_batch_size, rank
        self._split = split_step(global_batch_size, micro_batch_size, world_size)
        sizes = [
            _num_samples(name, dataset, max_seq_len)
            for name, dataset in zip(prepared.names, prepared.sources, strict=True)
        ]
        self._order = SampleOrder(sizes, prepared.weights, seed, prepared.names, order)
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(QUEUE_DEPTH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="train-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> list[Batch]:
        """This rank's A micro-batches of the next step; errors of the thread come out here."""
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; the iterator is exhausted afterwards."""
        self._closed.set()
        self._thread.join()

    def _read_ahead(self) -> None:
        while not self._closed.is_set():
            item: list[Batch] | BaseException
            try:
                item = self._read_step(self._next_sample)
            except BaseException as error:  # not handled here: handed to whoever calls next()
                item = error
            self._next_sample += self._global_batch_size
            self._put(item)
            if isinstance(item, BaseException):
                return

    def _put(self, item: list[Batch] | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=POLL_S)
                return
            except queue.Full:
                continue

    def _read_step(self, first: int) -> list[Batch]:
        sources, indices = self._order(first, self._global_batch_size)
        samples = [
            Sample(self._datasets[source], int(index), first + row)
            for row, (source, index) in enumerate(zip(sources, indices, strict=True))
        ]
        batches: list[Batch] = []
        for ranks in zip(*self._split, strict=True):  # a micro-batch of each rank
            batches += self._read_batches([samples[rows.start : rows.stop] for rows in ranks])
        return [batch.pin() for batch in batches] if self._pin else batches

    def _read_batches(self, ranks: list[list[Sample]]) -> list[Batch]:
        if self._apart:
            return batches_apart(ranks, self._rank, self._max_seq_len, self._micro_batch_size)
        mine = ranks[self._rank]
        rows = [sample.row(self._max_seq_len, self._mask_documents) for sample in mine]
        if not rows:  # more ranks than samples: this one takes part without any
            return [_padding_batch(self._max_seq_len, self._mask_documents)]
        return [_batch(rows, [sample.number for sample in mine], self._mask_documents)]


def split_step(global_batch_size: int, micro_batch_size: int, world_size: int) -> list[list[range]]:
    """Which samples of a step (0 to G - 1) each rank takes, micro-batch by micro-batch.

    Every rank gets the same number A of micro-batches, since they are collective, and their sizes
    differ by at most one row. Where G is a multiple of B * world_size all of them have B rows.

    Returns:
        [rank][micro-batch] -> samples; empty ranges only where there are more ranks than samples.
    """
    num_micro_batches = -(-global_batch_size // (micro_batch_size * world_size))
    rows, rest = divmod(global_batch_size, num_micro_batches * world_size)
    ranks: list[list[range]] = [[] for _ in range(world_size)]
    start = 0
    for number in range(num_micro_batches * world_size):
        end = start + rows + (number < rest)
        ranks[number % world_size].append(range(start, end))
        start = end
    return ranks


def validation_batches(
    prepared: PreparedData,
    *,
    max_seq_len: int,
    mask_documents: bool,
    batch_size: int,
    rank: int,
    world_size: int,
    max_samples: int | None = None,
    apart: bool = False,
) -> Iterator[Batch]:
    """Held-out samples, dealt out to the ranks: as many batches for each.

    Samples are taken in order, from each source in turn. What is missing at the end is filled up
    with rows whose targets are all IGNORE_INDEX, so that ranks make the same collective calls.

    Args:
        prepared: Data to read.
        max_seq_len: T.
        mask_documents: As in training.
        batch_size: B.
        rank: Of this process.
        world_size: Number of processes.
        max_samples: How many at most over all ranks; None takes all.
        apart: As in training; otherwise all batches are of the same shape.

    Raises:
        ConfigError: Too little for one sample, or `max_samples` below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigError("max_samples", max_samples, "must be at least 1", "raise it")
    samples = _validation_samples(prepared, max_seq_len, max_samples)
    dealt = [samples[r::world_size] for r in range(world_size)]
    return (
        batch
        for start in range(0, len(dealt[0]), batch_size)
        for batch in _validation_batches(
            [mine[start : start + batch_size] for mine in dealt],
            rank,
            batch_size,
            max_seq_len,
            mask_documents,
            apart,
        )
    )


def _validation_samples(
    prepared: PreparedData, max_seq_len: int, max_samples: int | None
) -> list[Sample]:
    sizes = [max(0, dataset.num_tokens - 1) // max_seq_len for dataset in prepared.validation]
    total = sum(sizes)
    if not total:
        tokens = [dataset.num_tokens for dataset in prepared.validation]
        rule = f"the held-out documents have {tokens} tokens, a sample needs {max_seq_len + 1}"
        fix = "lower it, raise data.validation_fraction or add data"
        raise ConfigError("data.max_seq_len", max_seq_len, rule, fix)
    wanted = total if max_samples is None else min(total, max_samples)
    samples: list[Sample] = []
    for index in range(max(sizes)):
        for dataset, size in zip(prepared.validation, sizes, strict=True):
            if index < size:
                samples.append(Sample(dataset, index, len(samples)))
        if len(samples) >= wanted:
            break
    return samples[:wanted]


def _validation_batches(
    ranks: list[list[Sample]],
    rank: int,
    batch_size: int,
    max_seq_len: int,
    mask_documents: bool,
    apart: bool,
) -> list[Batch]:
    if apart:
        return batches_apart(ranks, rank, max_seq_len, batch_size)
    rows = [sample.row(max_seq_len, mask_documents) for sample in ranks[rank]]
    ids = [sample.number for sample in ranks[rank]]
    for _ in range(batch_size - len(rows)):
        rows.append(_padding_row(max_seq_len))
        ids.append(PADDING)
    return [_batch(rows, ids, mask_documents)]


def batches_apart(
    ranks: list[list[Sample]], rank: int, max_seq_len: int, micro_batch_size: int
) -> list[Batch]:
    """One rank's samples, each document of them in a row of its own: as many batches on each rank.

    Args:
        ranks: Samples of each rank.
        rank: Whose are wanted.
        max_seq_len: T.
        micro_batch_size: B; no batch has more than B * T tokens, padding included.
    """
    limit = max_seq_len * micro_batch_size
    num_batches = max(
        len(rows_of_tokens([n for s in samples for n in s.lengths(max_seq_len)], limit))
        for samples in ranks
    )
    rows, ids = [], []
    for sample in ranks[rank]:
        documents = cut_row(sample.row(max_seq_len, mask_documents=True))
        rows += documents
        ids += [sample.number] * len(documents)
    batches = [
        padded_batch([rows[i] for i in chosen], [ids[i] for i in chosen])
        for chosen in rows_of_tokens([len(inputs) for inputs, *_ in rows], limit)
    ]
    # Forward is collective under some strategies: none may do it more often than the others.
    missing = max(1, num_batches) - len(batches)
    return batches + [padded_batch([_padding_row(max_seq_len)], [PADDING])] * missing


def cut_row(row: Row) -> list[Row]:
    """The documents of a row, each as a row of its own length."""
    starts = np.flatnonzero(row[2] == 0)[1:]
    inputs, targets, positions = (np.split(column, starts) for column in row)
    return list(zip(inputs, targets, positions, strict=True))


def rows_of_tokens(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which rows make a batch, the longest first, so that little of it is padding.

    Args:
        lengths: Of the rows, none above `limit`.
        limit: Tokens of a batch when its rows are as long as its longest.

    Returns:
        Numbers of rows, each once.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > limit:
            batches.append([])
        batches[-1].append(row)
    return batches


def padded_batch(rows: list[Row], ids: list[int]) -> Batch:
    """A batch of rows of any lengths, filled up behind their ends."""
    length = max(len(inputs) for inputs, *_ in rows)
    padded, mask = [], np.zeros((len(rows), length), np.int64)
    for number, (inputs, targets, positions) in enumerate(rows):
        fill = (0, length - len(inputs))
        padded.append(
            (
                np.pad(inputs, fill),
                np.pad(targets, fill, constant_values=IGNORE_INDEX),
                np.pad(positions, fill),
            )
        )
        mask[number, : len(inputs)] = 1
    return replace(_batch(padded, ids, masked=False), attention_mask=torch.from_numpy(mask))


def _padding_row(max_seq_len: int) -> Row:
    no_loss = np.full(max_seq_len, IGNORE_INDEX)
    return np.zeros(max_seq_len, np.int64), no_loss, np.arange(max_seq_len)


def _padding_batch(max_seq_len: int, masked: bool) -> Batch:
    return _batch([_padding_row(max_seq_len)], [PADDING], masked)


def _batch(rows: list[Row], ids: list[int], masked: bool) -> Batch:
    columns = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    inputs, targets, positions = columns
    return Batch(
        input_ids=inputs,
        targets=targets,
        position_ids=positions if masked else None,
        attention_mask=None,
        sample_ids=ids,
        num_targets=int((targets != IGNORE_INDEX).sum()),
    )


def check_samples(prepared: PreparedData, max_seq_len: int) -> None:
    """Raises ConfigError for a source that does not make one sample to train on."""
    for name, dataset in zip(prepared.names, prepared.sources, strict=True):
        _num_samples(name, dataset, max_seq_len)


def _num_samples(name: str, dataset: TokenDataset, max_seq_len: int) -> int:
    size = max(0, dataset.num_tokens - 1) // max_seq_len
    if not size:
        rule = f"{name} has {dataset.num_tokens} training tokens, a sample needs {max_seq_len + 1}"
        raise ConfigError("data.max_seq_len", max_seq_len, rule, "lower it or add data")
    return size
