"""The same samples at the same step, whatever the ranks and the accumulation."""

import time

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from core.errors import ConfigError
from trainer.data.batch import IGNORE_INDEX, PADDING
from trainer.data.config import MixtureDataConfig, SourceConfig, SourceKind
from trainer.data.loader import TrainLoader, split_step, validation_batches
from trainer.data.order import SampleOrder

T, G = 16, 24


@pytest.fixture
def data(config, ready):
    return ready(config())


def loader(data, **changes):
    settings = {
        "max_seq_len": T,
        "mask_documents": False,
        "seed": 1,
        "global_batch_size": G,
        "micro_batch_size": 2,
        "rank": 0,
        "world_size": 1,
        "first_sample": 0,
        "pin": False,
    }
    return TrainLoader(data, **(settings | changes))


def steps(data, count, **changes):
    with loader(data, **changes) as batches:
        return [next(batches) for _ in range(count)]


def rows(micro_batches):
    """Sample id -> (inputs, targets)."""
    return {
        sample: (batch.input_ids[row].tolist(), batch.targets[row].tolist())
        for batch in micro_batches
        for row, sample in enumerate(batch.sample_ids)
    }


@pytest.mark.parametrize("global_batch_size", [1, 2, 7, 24, 31])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_a_step_is_shared_evenly_by_any_number_of_ranks(
    global_batch_size, micro_batch_size, world_size
):
    ranks = split_step(global_batch_size, micro_batch_size, world_size)
    sizes = [[len(rows) for rows in rank] for rank in ranks]
    assert len({len(rank) for rank in sizes}) == 1, "collectives would not match"
    every = [size for rank in sizes for size in rank]
    assert max(every) - min(every) <= 1 and max(every) <= micro_batch_size
    order = [row for number in zip(*ranks, strict=True) for rows in number for row in rows]
    assert order == list(range(global_batch_size)), "in turn, each sample once"


def test_a_rank_without_samples_takes_part_without_loss(data):
    shares = [steps(data, 1, global_batch_size=2, rank=r, world_size=3)[0] for r in range(3)]
    assert [batch.sample_ids for (batch,) in shares] == [[0], [1], [PADDING]]
    assert shares[2][0].num_targets == 0 and shares[2][0].input_ids.shape == (1, T)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_and_accumulation_only_share_the_global_batch_out(data, world_size, micro_batch_size):
    expected = [rows(step) for step in steps(data, 3, micro_batch_size=G)]
    layout = {"world_size": world_size, "micro_batch_size": micro_batch_size}
    found = [{} for _ in expected]
    for rank in range(world_size):
        for number, step in enumerate(steps(data, 3, rank=rank, **layout)):
            assert len(step) == G // (world_size * micro_batch_size)
            assert not found[number].keys() & rows(step).keys()
            found[number] |= rows(step)
    assert found == expected
    assert [sorted(step) for step in found] == [list(range(s * G, s * G + G)) for s in range(3)]


def test_resuming_needs_nothing_but_the_number_of_samples(data):
    whole = steps(data, 5)
    resumed = steps(data, 2, first_sample=3 * G, world_size=2, rank=1)
    again = rows(whole[3])
    assert all(again[sample] == row for sample, row in rows(resumed[0]).items())
    far = steps(data, 1, first_sample=10_000_000)
    assert far[0][0].sample_ids == [10_000_000, 10_000_001]


def test_samples_are_those_of_the_order(data):
    dataset = data.sources[0]
    size = (dataset.num_tokens - 1) // T
    _, samples = SampleOrder([size], [1.0], seed=1)(0, G)
    (batch,) = steps(data, 1, micro_batch_size=G)[0]
    for row, sample in enumerate(samples.tolist()):
        tokens = dataset.read(sample * T, T + 1)
        assert batch.input_ids[row].tolist() == tokens[:-1].tolist()
        assert batch.targets[row].tolist() == tokens[1:].tolist()
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.position_ids is None and batch.num_targets == G * T


def test_an_epoch_reads_every_token_once(data):
    dataset = data.sources[0]
    size = (dataset.num_tokens - 1) // T
    (batch,) = steps(data, 1, global_batch_size=size, micro_batch_size=size)[0]
    stream = dataset.read(0, size * T)
    assert (np.sort(batch.input_ids.flatten().numpy()) == np.sort(stream)).all()


def test_no_target_crosses_documents_when_they_are_masked(data):
    dataset, eos = data.sources[0], data.tokenizer.eos_token_id
    size = (dataset.num_tokens - 1) // T
    layout = {"global_batch_size": size, "micro_batch_size": size}
    ((masked,), (plain,)) = (
        steps(data, 1, mask_documents=mask, **layout)[0] for mask in (True, False)
    )
    ends = masked.input_ids == eos  # texts never hold an EOS of their own
    assert ends.sum() > 50
    assert (masked.targets[ends] == IGNORE_INDEX).all()
    assert (masked.targets[~ends] == plain.targets[~ends]).all()
    assert masked.num_targets == int((~ends).sum())
    expected = torch.zeros_like(masked.input_ids)
    for column in range(1, T):
        after = expected[:, column - 1] + 1
        expected[:, column] = torch.where(ends[:, column - 1], 0, after)
    assert (masked.position_ids == expected).all()


@pytest.mark.parametrize("world_size", [1, 3])
def test_documents_apart_have_rows_of_their_own_and_lose_nothing(data, world_size):
    layout = {"world_size": world_size, "micro_batch_size": 2, "mask_documents": True}
    masked, apart = (
        [steps(data, 2, rank=rank, apart=apart, **layout) for rank in range(world_size)]
        for apart in (False, True)
    )
    for step in range(2):
        assert len({len(rank[step]) for rank in apart}) == 1, "forward is collective"
        learned = []
        for ranks in (masked, apart):
            batches = [batch for rank in ranks for batch in rank[step]]
            kept = [batch.targets != IGNORE_INDEX for batch in batches]
            pairs = [
                pair
                for batch, mask in zip(batches, kept, strict=True)
                for pair in zip(batch.input_ids[mask], batch.targets[mask], strict=True)
            ]
            learned.append(sorted((int(i), int(t)) for i, t in pairs))
            assert sum(batch.num_targets for batch in batches) == len(pairs)
        assert learned[0] == learned[1]
    for batch in (batch for rank in apart for step in rank for batch in step):
        assert batch.position_ids is None and batch.input_ids.numel() <= 2 * T
        lengths = batch.attention_mask.sum(1)
        assert lengths.max() == batch.input_ids.shape[1]
        for row, length in enumerate(lengths.tolist()):
            inside = batch.targets[row, : length - 1] != IGNORE_INDEX
            assert inside.all() or batch.sample_ids[row] == PADDING
            assert (batch.targets[row, length:] == IGNORE_INDEX).all()


def test_documents_held_out_are_apart_too(data):
    settings = {"max_seq_len": T, "mask_documents": True, "batch_size": 3, "world_size": 2}
    counts, targets = [], [0, 0]
    for apart in (False, True):
        ranks = [list(validation_batches(data, rank=r, apart=apart, **settings)) for r in range(2)]
        targets[apart] = sum(batch.num_targets for rank in ranks for batch in rank)
        counts.append({len(rank) for rank in ranks})
    assert targets[0] == targets[1] and len(counts[1]) == 1


def test_a_mixture_draws_by_weight(config, ready, tmp_path, folder):
    (tmp_path / "digits.txt").write_text("\n\n".join(str(n) * 40 for n in range(5000)))
    text = SourceConfig(kind=SourceKind.text, path=str(folder), weight=1.0)
    digits = SourceConfig(kind=SourceKind.text, path=str(tmp_path / "digits.txt"), weight=3.0)
    cfg = MixtureDataConfig(
        sources={"text": text, "digits": digits},
        cache_dir=str(tmp_path / "cache"),
        tokenizer_vocab_size=300,
        validation_fraction=0.2,
    )
    data = ready(cfg)
    (batch,) = steps(data, 1, global_batch_size=1024, micro_batch_size=1024)[0]
    of_digits = [
        set(data.tokenizer.decode(row)) <= set("0123456789\n") | set("<|endoftext|>")
        for row in batch.input_ids.tolist()
    ]
    assert sum(of_digits) == 768
    first = next(validation_batches(data, max_seq_len=T, mask_documents=False, batch_size=8,
                                    rank=0, world_size=1, max_samples=8))  # fmt: skip
    texts = [data.tokenizer.decode(row) for row in first.input_ids.tolist()]
    assert [set(text) <= set("0123456789\n") for text in texts] == [False, True] * 4
    digits.weight = 1e-6
    with pytest.raises(ConfigError, match=r"data\.sources\.digits\.weight"):
        loader(ready(cfg))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("max_samples", [1, 7, 20, None])
def test_validation_gives_every_rank_as_many_batches(data, world_size, max_samples):
    settings = {"max_seq_len": T, "mask_documents": True, "batch_size": 3, "world_size": world_size}
    settings["max_samples"] = max_samples
    ranks = [list(validation_batches(data, rank=rank, **settings)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    total = (data.validation[0].num_tokens - 1) // T
    wanted = total if max_samples is None else max_samples
    ids = [sample for batches in ranks for batch in batches for sample in batch.sample_ids]
    assert sorted(sample for sample in ids if sample != PADDING) == list(range(wanted))
    for batches in ranks:
        for batch in batches:
            assert batch.input_ids.shape == batch.position_ids.shape == (3, T)
            assert batch.num_targets == int((batch.targets != IGNORE_INDEX).sum())
            padding = torch.tensor([sample == PADDING for sample in batch.sample_ids])
            assert (batch.targets[padding] == IGNORE_INDEX).all()


def test_too_little_data_is_refused_with_numbers(data):
    tokens = data.sources[0].num_tokens
    with pytest.raises(ConfigError, match=f"text has {tokens} training tokens.*needs {tokens + 1}"):
        loader(data, max_seq_len=tokens)
    settings = {"mask_documents": False, "batch_size": 1, "rank": 0, "world_size": 1}
    held_out = data.validation[0].num_tokens
    with pytest.raises(ConfigError, match=f"held-out documents have .*{held_out}"):
        validation_batches(data, max_seq_len=held_out, **settings)
    with pytest.raises(ConfigError, match="max_samples=0"):
        validation_batches(data, max_seq_len=T, max_samples=0, **settings)


def test_an_error_in_the_thread_comes_out_of_next(data, monkeypatch):
    monkeypatch.setattr(data.sources[0], "read", lambda *_: 1 / 0)
    batches = loader(data)
    with pytest.raises(ZeroDivisionError):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_closing_ends_the_thread_even_when_nobody_reads(data):
    batches = loader(data)
    time.sleep(0.1)  # the queue fills up
    batches.close()
    assert not batches._thread.is_alive()
    with pytest.raises(StopIteration):
        next(batches)


def test_batches_move_to_a_device(data):
    batch = steps(data, 1, mask_documents=True)[0][0].to("meta")
    assert batch.input_ids.device.type == batch.position_ids.device.type == "meta"
    assert batch.num_targets > 0 and len(batch.sample_ids) == 2
