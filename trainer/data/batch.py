"""Forms batches from samples: rows of packed samples, or rows of separate documents.

Shapes: B rows of a micro-batch, T tokens in a sample. Documents that are computed apart have rows
of their own, of L tokens, the longest's length.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.tokens import TokenDataset, Tokens

IGNORE_INDEX = -100
PADDING = -1  # sample id of a row that only fills up a batch

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


def batch_of(rows: list[Row], ids: list[int], masked: bool) -> Batch:
    """Returns a batch of rows of equal length.

    Args:
        rows: Rows of the batch.
        ids: Sample id of each row.
        masked: True passes positions on, by which models tell documents apart.
    """
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
    return batches + [padded_batch([padding_row(max_seq_len)], [PADDING])] * missing


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
    return replace(batch_of(padded, ids, masked=False), attention_mask=torch.from_numpy(mask))


def padding_row(max_seq_len: int) -> Row:
    """Returns a row without loss, for a rank that has no sample left."""
    no_loss = np.full(max_seq_len, IGNORE_INDEX)
    return np.zeros(max_seq_len, np.int64), no_loss, np.arange(max_seq_len)
