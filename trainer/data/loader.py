"""Reads the batches of each step, with no state but a position in the stream.

Rank, world size and accumulation only select the part of a step that is read here. Any number of
ranks can share a step: its samples are distributed as evenly as possible.

Shapes: B rows of a micro-batch, T tokens in a sample, G samples in a step, A micro-batches in a
step.
"""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType

from core.errors import ConfigError
from trainer.data.batch import PADDING, Batch, Sample, batch_of, batches_apart, padding_row
from trainer.data.order import OrderRule, SampleOrder
from trainer.data.prepare import PreparedData
from trainer.data.tokens import TokenDataset

QUEUE_DEPTH = 2  # steps to read ahead
POLL_S = 0.1


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
        ids = [sample.number for sample in mine]
        if not rows:  # with more ranks than samples, this rank computes on padding only
            rows, ids = [padding_row(self._max_seq_len)], [PADDING]
        return [batch_of(rows, ids, self._mask_documents)]


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
        rows.append(padding_row(max_seq_len))
        ids.append(PADDING)
    return [batch_of(rows, ids, mask_documents)]


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
