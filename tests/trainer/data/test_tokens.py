import json
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from core.errors import ConfigError, DamagedError
from trainer.data.tokenizer import (
    check_for_model,
    check_tokenizer,
    fingerprint,
    load_tokenizer,
    plain_backend,
    tokenizer_family,
    train_tokenizer,
)
from trainer.data.tokens import TokenDataset, read_manifest, verify
from trainer.data.writer import TokenDatasetWriter

SAMPLES = ["hello world", "naïve 😀 \x00 \t\r\n  end", "12345 3.14", "<|endoftext|> is text", " "]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hello world, hello tokens 2024"] * 5, 280)


def write(folder, tokenizer, lengths=(5, 1, 9, 4), shard_tokens=6):
    folder.mkdir()
    stream = np.random.default_rng(0).integers(0, 250, sum(lengths) * 2).tolist()
    position = 0
    with TokenDatasetWriter(folder, tokenizer, shard_tokens=shard_tokens) as writer:
        for split in ("train", "validation"):
            for length in lengths:
                writer.add(split, stream[position : position + length], 2 * length)
                position += length
        writer.finish({"kind": "test", "files": []}, {})
    return stream[: sum(lengths)]


def test_every_text_comes_back_from_its_tokens(tokenizer):
    backend = plain_backend(tokenizer)
    everything = bytes(range(1, 128)).decode() + "".join(chr(c) for c in range(128, 3000))
    for text in [*SAMPLES, everything]:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids


def test_training_is_deterministic_across_processes(tokenizer):
    code = (
        "from trainer.data.tokenizer import *;"
        "print(fingerprint(train_tokenizer(['hello world, hello tokens 2024'] * 5, 280)))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == fingerprint(tokenizer)


def test_the_fingerprint_survives_saving_and_calls_but_no_change(tokenizer, tmp_path):
    before = fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "one")
    again = load_tokenizer(str(tmp_path / "one"))
    again(["a", "b b b"], truncation=True, max_length=2)
    assert fingerprint(again) == before
    again.chat_template = "{{ messages }}"
    assert fingerprint(again) != before
    changed = AutoTokenizer.from_pretrained(tmp_path / "one")
    changed.add_tokens(["<tool>"])
    assert fingerprint(changed) != before
    assert fingerprint(train_tokenizer(["other"], 280)) != before


def test_a_tokenizer_that_cannot_be_used_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="data.tokenizer=.*no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path / "absent"))
    tokenizer.save_pretrained(tmp_path / "no_eos")
    settings = tmp_path / "no_eos" / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    del content["eos_token"]
    settings.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="no EOS token"):
        load_tokenizer(str(tmp_path / "no_eos"))
    with pytest.raises(ConfigError, match="data.tokenizer_vocab_size=100"):
        train_tokenizer(["x"], 100)


CODE = "def f(x):\n\treturn x ** 2\n\n    if a != b:\n        pass  # don't 2024\n" * 3


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_5_moe_text"])
def test_a_trained_tokenizer_is_loaded_as_it_was_trained(model_type, tmp_path):
    config = AutoConfig.for_model(model_type)
    trained = train_tokenizer([CODE] * 5, 300, tokenizer_family(config))
    trained.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(str(tmp_path))) == fingerprint(trained)
    config.save_pretrained(tmp_path)
    check_tokenizer(tmp_path, trained, [CODE])
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    as_written = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in [CODE, *SAMPLES]:
        assert loaded(text).input_ids == as_written(text).input_ids
        assert loaded.decode(loaded(text).input_ids) == text


def test_a_tokenizer_that_would_be_loaded_as_another_is_refused(tmp_path):
    trained = train_tokenizer([CODE] * 5, 300)
    trained.save_pretrained(tmp_path)
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    check_tokenizer(tmp_path, trained, [CODE])
    qwen2 = AutoConfig.for_model("qwen2")
    with pytest.raises(ConfigError, match="data.tokenizer=mine: .*every tokenizer of a qwen2 as"):
        check_for_model("mine", trained, qwen2)
    qwen2.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="export=.*makes other tokens of"):
        check_tokenizer(tmp_path, trained, [CODE])
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    trained.chat_template = "{{ messages }}"
    with pytest.raises(ConfigError, match="another chat template"):
        check_tokenizer(tmp_path, trained)
    trained.chat_template = None
    trained.add_tokens(["<tool>"])
    with pytest.raises(ConfigError, match="has 291 tokens, not the 292"):
        check_tokenizer(tmp_path, trained)


def test_reading_crosses_shards(tokenizer, tmp_path):
    stream = write(tmp_path / "data", tokenizer)
    dataset = TokenDataset.open(tmp_path / "data", "train")
    assert [shard["num_tokens"] for shard in dataset.manifest["splits"]["train"]["shards"]] == [
        6, 6, 6, 1,
    ]  # fmt: skip
    assert (dataset.num_tokens, dataset.num_documents, dataset.num_bytes) == (19, 4, 38)
    for start in range(20):
        for count in range(20 - start):
            read = dataset.read(start, count)
            assert read.dtype == np.int64 and read.tolist() == stream[start : start + count]
    for start, count in ((-1, 2), (19, 1), (0, 20)):
        with pytest.raises(IndexError):
            dataset.read(start, count)


def test_document_starts(tokenizer, tmp_path):
    write(tmp_path / "data", tokenizer)  # documents start at 0, 5, 6 and 15
    dataset = TokenDataset.open(tmp_path / "data", "train")
    assert dataset.document_starts(0, 19).tolist() == [0, 5, 6, 15]
    assert dataset.document_starts(5, 10).tolist() == [0, 1]
    assert dataset.document_starts(7, 8).tolist() == []


def test_a_large_vocabulary_takes_four_bytes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.writer.vocab_size_of", lambda _: 70_000)
    (tmp_path / "data").mkdir()
    with TokenDatasetWriter(tmp_path / "data", tokenizer, shard_tokens=10) as writer:
        for split in ("train", "validation"):
            writer.add(split, [69_999, 1], 3)
        writer.finish({}, {})
    dataset = TokenDataset.open(tmp_path / "data", "train")
    assert dataset.manifest["dtype"] == "uint32" and dataset.read(0, 2).tolist() == [69_999, 1]


FILES = [
    "train-00001.bin",
    "validation-00000.bin",
    "train-documents.bin",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "manifest.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused_and_named(tokenizer, tmp_path, name):
    write(tmp_path / "data", tokenizer)
    verify(tmp_path / "data", 0, 1)
    path = tmp_path / "data" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{name}.*delete .*data; it is prepared again"):
        verify(tmp_path / "data", 0, 1)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_refused_when_opened(tokenizer, tmp_path, name):
    write(tmp_path / "data", tokenizer)
    path = tmp_path / "data" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DamagedError, match=name):
        TokenDataset.open(tmp_path / "data", "train")
    path.unlink()
    with pytest.raises(ConfigError, match=name):
        TokenDataset.open(tmp_path / "data", "train")


def test_ranks_share_the_verification(tokenizer, tmp_path):
    write(tmp_path / "data", tokenizer)
    path = tmp_path / "data" / "train-00002.bin"  # file number 2: rank 2 of 3 reads it
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    verify(tmp_path / "data", 0, 3)
    verify(tmp_path / "data", 1, 3)
    with pytest.raises(DamagedError, match="train-00002.bin"):
        verify(tmp_path / "data", 2, 3)


def test_a_later_format_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.writer.FORMAT_VERSION", 2)
    write(tmp_path / "data", tokenizer)
    with pytest.raises(ConfigError, match="has format 2, this version reads 1"):
        read_manifest(tmp_path / "data")
