"""Forms batches from samples, with no state but a position in the stream.

Rank, world size and accumulation only select the part of a step that is read here. Any number of
ranks can share a step: its samples are distributed as evenly as possible.

Shapes: B rows of a micro-batch, T tokens in a sample, G samples in a step, A micro-batches in a
step. Documents that are computed apart have rows of their own, of L tokens, the longest's length.
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
PADDING = -1  # sample id of a row that only fills up a batch
QUEUE_DEPTH = 2  # steps to read ahead
POLL_S = 0.1


# Inputs, targets and positions, each (T,).
Row = tuple[Tokens, Tokens, Tokens]


@dataclass(frozen=True)
class Sample:
    """Describes tokens [index * T, index * T + T + 1) of a dataset.

    Attributes:
        dataset: Dataset that contains the tokens.
        index: Number of the sample within the dataset.
        number: Position of the sample in the stream, or among the held-out samples.
    """

    dataset: TokenDataset
    index: int
    number: int

    def row(self, max_seq_len: int, mask_documents: bool) -> Row:
        """Returns the inputs, targets and positions of the sample."""
        start = self.index * max_seq_len
        tokens = self.dataset.read(start, max_seq_len + 1)
        inputs, targets, positions = tokens[:-1], tokens[1:].copy(), np.arange(max_seq_len)
        if mask_documents:
            starts = self._starts(max_seq_len)
            # The last token of a document must not predict the first token of the next.
            targets[starts - 1] = IGNORE_INDEX
            begins = np.zeros(max_seq_len, np.int64)
            inside = starts[starts < max_seq_len]
            begins[inside] = inside
            # The maximum so far of the starts is, at each token, the start of its document.
            positions = positions - np.maximum.accumulate(begins)
        return inputs, targets, positions

    def lengths(self, max_seq_len: int) -> list[int]:
        """Returns the number of tokens of each document, or of its part in this sample."""
        starts = self._starts(max_seq_len)
        borders = [0, *starts[starts < max_seq_len].tolist(), max_seq_len]
        return [end - start for start, end in itertools.pairwise(borders)]

    def _starts(self, max_seq_len: int) -> Tokens:
        """Returns the offsets, from 1 to T, at which documents start in the sample."""
        return self.dataset.document_starts(self.index * max_seq_len + 1, max_seq_len) + 1


@dataclass(frozen=True)
class Batch:
    """Holds rows of packed samples, or of separate documents.

    Attributes:
        input_ids: Token ids, (B, T) int64.
        targets: Next tokens, (B, T) int64; IGNORE_INDEX where there is no loss.
        position_ids: Positions, (B, T) int64, from 0 at each document's start, if documents are
            masked and share rows; otherwise None.
        attention_mask: Mask, (B, T) int64, 0 for padding behind a document, if each document has a
            row of its own; otherwise None.
        sample_ids: Positions in the stream (training) or numbers of the samples (validation), (B,);
            PADDING for a row without loss that only fills up the batch.
        num_targets: Number of targets that are not IGNORE_INDEX.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    sample_ids: list[int]
    num_targets: int

    def inputs(self) -> dict[str, Tensor | None]:
        """Returns the arguments of an objective."""
        return {
            "input_ids": self.input_ids,
            "targets": self.targets,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
        }

    def to(self, device: torch.device | str) -> "Batch":
        """Copies the batch to a device; from pinned memory without waiting for the copy."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """Copies the batch to page-locked memory, from which a GPU copies asynchronously."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {
            name: None if tensor is None else move(tensor) for name, tensor in self.inputs().items()
        }
        return replace(self, **tensors)


class TrainLoader:
    """Iterates endlessly over steps: each `next` is this rank's micro-batches of one step.

    Sample ids of step s are [first_sample + s * G, first_sample + (s + 1) * G), distributed by
    `split_step`. A thread reads two steps ahead.

    Args:
        prepared: Data to read.
        max_seq_len: T.
        mask_documents: True allows no target across a document border, and restarts positions at 0.
        apart: True gives each document, or its part in a sample, a row of its own, for models that
            cannot tell documents apart by positions; requires `mask_documents`. A micro-batch is
            then split into batches of at most B * T tokens.
        seed: Seed of the order of samples.
        global_batch_size: G, over all ranks and micro-batches.
        micro_batch_size: B, as an upper bound.
        rank: Number of this process among those that read different data.
        world_size: Number of those processes.
        first_sample: Position in the stream at which to start: the number of samples trained on.
        pin: True returns page-locked tensors (CUDA only).
        order: Rule by which the weights of a mixture are counted.

    Raises:
        ConfigError: A source is too small for one sample, or a weight is too small.
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
        """Returns this rank's A micro-batches of the next step; raises the thread's errors."""
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
        """Ends the thread; the iterator is exhausted afterwards."""
        self._closed.set()
        self._thread.join()

    def _read_ahead(self) -> None:
        while not self._closed.is_set():
            item: list[Batch] | BaseException
            try:
                item = self._read_step(self._next_sample)
            except BaseException as error:  # raised again in the thread that calls next()
                item = error
            self._next_sample += self._global_batch_size
            self._put(item)
            if isinstance(item, BaseException):
                return

    def _put(self, item: list[Batch] | BaseException) -> None:
        # Waiting with a timeout, so that `close` ends a thread whose queue nobody empties.
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
        for ranks in zip(*self._split, strict=True):  # one micro-batch of each rank
            batches += self._read_batches([samples[rows.start : rows.stop] for rows in ranks])
        return [batch.pin() for batch in batches] if self._pin else batches

    def _read_batches(self, ranks: list[list[Sample]]) -> list[Batch]:
        if self._apart:
            return batches_apart(ranks, self._rank, self._max_seq_len, self._micro_batch_size)
        mine = ranks[self._rank]
        rows = [sample.row(self._max_seq_len, self._mask_documents) for sample in mine]
        if not rows:  # with more ranks than samples, this rank computes on padding only
            return [_padding_batch(self._max_seq_len, self._mask_documents)]
        return [_batch(rows, [sample.number for sample in mine], self._mask_documents)]


def split_step(global_batch_size: int, micro_batch_size: int, world_size: int) -> list[list[range]]:
    """Returns the samples of a step (0 to G - 1) that each rank takes, by micro-batch.

    Every rank gets the same number A of micro-batches, since they are collective, and their sizes
    differ by at most one row. If G is a multiple of B * world_size, all of them have B rows.

    Returns:
        Samples as [rank][micro-batch]; a range is empty only with more ranks than samples.
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
    """Returns batches of held-out samples for one rank; all ranks get the same number of batches.

    Samples are taken in order, from each source in turn. Missing rows at the end are filled with
    rows whose targets are all IGNORE_INDEX, so that ranks make the same collective calls.

    Args:
        prepared: Data to read.
        max_seq_len: T.
        mask_documents: See `TrainLoader`.
        batch_size: B.
        rank: Number of this process.
        world_size: Number of processes.
        max_samples: Largest number of samples over all ranks; None takes all.
        apart: See `TrainLoader`; without it all batches have the same shape.

    Raises:
        ConfigError: There are too few tokens for one sample, or `max_samples` is below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigError("max_samples", max_samples, "must be at least 1", "raise it")
    samples = _validation_samples(prepared, max_seq_len, max_samples)
    # Rank 0 is dealt the first sample of each round, so it has the most batches.
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
    # Round robin over the sources, so that a limit takes equally many samples of each.
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
    """Returns one rank's samples with each document in a row of its own; equally many on all ranks.

    Args:
        ranks: Samples of each rank.
        rank: Rank whose batches are returned.
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
    # Forward is collective under some strategies, so all ranks need the same number of calls.
    missing = max(1, num_batches) - len(batches)
    return batches + [padded_batch([_padding_row(max_seq_len)], [PADDING])] * missing


def cut_row(row: Row) -> list[Row]:
    """Returns the documents of a row, each as a row of its own length."""
    starts = np.flatnonzero(row[2] == 0)[1:]
    inputs, targets, positions = (np.split(column, starts) for column in row)
    return list(zip(inputs, targets, positions, strict=True))


def rows_of_tokens(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Returns batches of row numbers, with the longest rows first to keep padding small.

    Args:
        lengths: Lengths of the rows, none above `limit`.
        limit: Largest number of tokens in a batch, padding included.

    Returns:
        Row numbers of each batch; each row occurs once.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        # Rows are sorted, so the first row of a batch is its longest and sets the padded length.
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > limit:
            batches.append([])
        batches[-1].append(row)
    return batches


def padded_batch(rows: list[Row], ids: list[int]) -> Batch:
    """Returns a batch of rows of any lengths, padded at their ends."""
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
    """Raises ConfigError for a source that is too small for one training sample."""
    for name, dataset in zip(prepared.names, prepared.sources, strict=True):
        _num_samples(name, dataset, max_seq_len)


def _num_samples(name: str, dataset: TokenDataset, max_seq_len: int) -> int:
    size = max(0, dataset.num_tokens - 1) // max_seq_len
    if not size:
        rule = f"{name} has {dataset.num_tokens} training tokens, a sample needs {max_seq_len + 1}"
        raise ConfigError("data.max_seq_len", max_seq_len, rule, "lower it or add data")
    return size
