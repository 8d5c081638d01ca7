"""Samples to batches, without any state but a position in the stream.

Rank, world size and accumulation only choose which part of a step is read here, and any number of
ranks can share a step: its samples are dealt out as evenly as they can be.

Shapes: B rows of a micro-batch, T tokens in a sample, G samples in a step, A micro-batches in a
step.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from monitoring.errors import ConfigError
from trainer.data.order import OrderRule, SampleOrder
from trainer.data.prepare import PreparedData
from trainer.data.tokens import TokenDataset, Tokens

IGNORE_INDEX = -100
PADDING = -1  # sample id of a row that only fills a batch up
QUEUE_DEPTH = 2
POLL_S = 0.1


@dataclass(frozen=True)
class Batch:
    """Rows of packed samples.

    Attributes:
        input_ids: (B, T) int64.
        targets: (B, T) int64, the next token; IGNORE_INDEX where there is no loss.
        position_ids: (B, T) int64 from 0 at each document's start, if documents are masked; else
            None.
        sample_ids: (B,) positions in the stream (training) or numbers of the sample (validation);
            PADDING for a row without loss that only fills the batch up.
        num_targets: Targets that are not IGNORE_INDEX.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor | None
    sample_ids: list[int]
    num_targets: int

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device; from pinned memory without waiting for the copy."""
        positions = self.position_ids
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            position_ids=None if positions is None else positions.to(device, non_blocking=True),
        )

    def pin(self) -> "Batch":
        """Copy to page-locked memory, from which a GPU fetches on its own."""
        positions = self.position_ids
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            targets=self.targets.pin_memory(),
            position_ids=None if positions is None else positions.pin_memory(),
        )


class TrainLoader:
    """Endless iterator over steps: each `next` is this rank's micro-batches of one step.

    Sample ids of step s are [first_sample + s * G, first_sample + (s + 1) * G), dealt out by
    `split_step`. A thread reads ahead by two steps.

    Args:
        prepared: Data to read.
        max_seq_len: T.
        mask_documents: Keep documents apart: no target across a border, positions from 0 in each.
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
    ) -> None:
        self._datasets, self._max_seq_len = prepared.sources, max_seq_len
        self._mask_documents, self._pin = mask_documents, pin
        self._global_batch_size, self._next_sample = global_batch_size, first_sample
        self._micro_batches = split_step(global_batch_size, micro_batch_size, world_size)[rank]
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
        sources, samples = self._order(first, self._global_batch_size)
        return [
            self._read_batch(
                [(self._datasets[sources[row]], int(samples[row])) for row in rows],
                [first + row for row in rows],
            )
            for rows in self._micro_batches
        ]

    def _read_batch(self, rows: list[tuple[TokenDataset, int]], ids: list[int]) -> Batch:
        read = [_row(*row, self._max_seq_len, self._mask_documents) for row in rows]
        if not read:  # more ranks than samples: this one takes part without any
            read, ids = [_padding_row(self._max_seq_len)], [PADDING]
        batch = _batch(read, ids, self._mask_documents)
        return batch.pin() if self._pin else batch


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
) -> Iterator[Batch]:
    """Held-out samples, dealt out to the ranks: as many batches of the same shape for each.

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

    Raises:
        ConfigError: Too little for one sample, or `max_samples` below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigError("max_samples", max_samples, "must be at least 1", "raise it")
    samples = _validation_samples(prepared, max_seq_len, max_samples)
    num_batches = -(-len(samples) // (world_size * batch_size))
    mine = list(enumerate(samples))[rank::world_size]
    return (
        _validation_batch(
            mine[number * batch_size : (number + 1) * batch_size],
            batch_size,
            max_seq_len,
            mask_documents,
        )
        for number in range(num_batches)
    )


def _validation_samples(
    prepared: PreparedData, max_seq_len: int, max_samples: int | None
) -> list[tuple[TokenDataset, int]]:
    sizes = [max(0, dataset.num_tokens - 1) // max_seq_len for dataset in prepared.validation]
    total = sum(sizes)
    if not total:
        tokens = [dataset.num_tokens for dataset in prepared.validation]
        rule = f"the held-out documents have {tokens} tokens, a sample needs {max_seq_len + 1}"
        fix = "lower it, raise data.validation_fraction or add data"
        raise ConfigError("data.max_seq_len", max_seq_len, rule, fix)
    wanted = total if max_samples is None else min(total, max_samples)
    samples: list[tuple[TokenDataset, int]] = []
    for index in range(max(sizes)):
        for dataset, size in zip(prepared.validation, sizes, strict=True):
            if index < size:
                samples.append((dataset, index))
        if len(samples) >= wanted:
            break
    return samples[:wanted]


def _validation_batch(
    samples: list[tuple[int, tuple[TokenDataset, int]]],
    batch_size: int,
    max_seq_len: int,
    mask_documents: bool,
) -> Batch:
    rows = [_row(*sample, max_seq_len, mask_documents) for _, sample in samples]
    ids = [number for number, _ in samples]
    for _ in range(batch_size - len(rows)):
        rows.append(_padding_row(max_seq_len))
        ids.append(PADDING)
    return _batch(rows, ids, mask_documents)


def _padding_row(max_seq_len: int) -> tuple[Tokens, Tokens, Tokens]:
    no_loss = np.full(max_seq_len, IGNORE_INDEX)
    return np.zeros(max_seq_len, np.int64), no_loss, np.arange(max_seq_len)


def _row(
    dataset: TokenDataset, sample: int, max_seq_len: int, mask_documents: bool
) -> tuple[Tokens, Tokens, Tokens]:
    """Inputs, targets and positions of tokens [sample * T, sample * T + T + 1): each (T,)."""
    start = sample * max_seq_len
    tokens = dataset.read(start, max_seq_len + 1)
    inputs, targets, positions = tokens[:-1], tokens[1:].copy(), np.arange(max_seq_len)
    if mask_documents:
        starts = dataset.document_starts(start + 1, max_seq_len)  # offsets of starts in targets
        targets[starts] = IGNORE_INDEX
        begins = np.zeros(max_seq_len, np.int64)
        inside = starts[starts + 1 < max_seq_len] + 1
        begins[inside] = inside
        positions = positions - np.maximum.accumulate(begins)
    return inputs, targets, positions


def _batch(rows: list[tuple[Tokens, Tokens, Tokens]], ids: list[int], masked: bool) -> Batch:
    columns = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    inputs, targets, positions = columns
    return Batch(
        input_ids=inputs,
        targets=targets,
        position_ids=positions if masked else None,
        sample_ids=ids,
        num_targets=int((targets != IGNORE_INDEX).sum()),
    )


def _num_samples(name: str, dataset: TokenDataset, max_seq_len: int) -> int:
    size = max(0, dataset.num_tokens - 1) // max_seq_len
    if not size:
        rule = f"{name} has {dataset.num_tokens} training tokens, a sample needs {max_seq_len + 1}"
        raise ConfigError("data.max_seq_len", max_seq_len, rule, "lower it or add data")
    return size
