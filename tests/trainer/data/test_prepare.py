import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedTokenizerFast

from core.errors import ConfigError, DamagedError, Interrupted
from core.settings.rules import check_settings
from tests.trainer.data.samples import make_texts, write_folder
from trainer.data.config import MixtureDataConfig, SourceConfig, SourceKind
from trainer.data.prepare import prepare
from trainer.data.tokenizer import train_tokenizer
from trainer.data.tokens import TokenDataset
from trainer.data.writer import TokenDatasetWriter

ROOT = Path(__file__).parents[3]
TEXT, TOKENS = SourceKind.text, SourceKind.tokens


def leftovers(cfg):
    """What is in the cache besides locks and digests."""
    return [p.name for p in Path(cfg.cache_dir).glob("*") if p.is_dir()]


def decoded(dataset, tokenizer):
    stream = dataset.read(0, dataset.num_tokens).tolist()
    starts = [*dataset.document_starts(0, dataset.num_tokens).tolist(), dataset.num_tokens]
    documents = [stream[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


def test_every_document_is_in_one_split_and_comes_back(config, ready, texts):
    data = ready(config(shard_tokens=500))
    (train,), (validation,) = data.sources, data.validation
    assert len(train.manifest["splits"]["train"]["shards"]) > 3
    kept, held_out = decoded(train, data.tokenizer), decoded(validation, data.tokenizer)
    assert sorted(kept + held_out) == sorted(texts)
    assert kept == sorted(kept, key=texts.index)
    assert 10 < len(held_out) < 40  # 24 expected
    assert validation.first_texts(data.tokenizer, 3) == held_out[:3]
    assert validation.first_texts(data.tokenizer, 1000) == held_out
    size = sum(len(text.encode()) for text in held_out)
    assert validation.num_bytes == size
    assert data.validation_bytes_per_token == size / validation.num_tokens


def test_a_held_out_document_stays_held_out_when_others_come(config, ready, folder):
    def held_out(data):
        return set(decoded(data.validation[0], data.tokenizer))

    before = held_out(ready(config()))
    write_folder(folder / "more", make_texts(50, seed=1))
    assert before < held_out(ready(config()))


def test_the_address_is_stable_and_changes_with_every_input(config, ready, folder, tmp_path):
    first = ready(config())
    assert ready(config()).digest == first.digest
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    again = ready(config(path=str(moved), cache_dir=str(tmp_path / "cache2")))
    assert again.digest == first.digest and again.folders[0].name == first.folders[0].name
    for free in ({"max_seq_len": 7}, {"mask_documents": True}, {"verify": False}):
        assert ready(config(**free)).folders == first.folders
    seen = {first.folders[0].name}
    for change in (
        {"validation_fraction": 0.3},
        {"tokenizer_vocab_size": 280},
        {"shard_tokens": 100},
        {"path": str(folder / "00*.txt")},
    ):
        seen.add(ready(config(**change)).folders[0].name)
    (folder / "0000.txt").write_text("another text")
    seen.add(ready(config()).folders[0].name)
    assert len(seen) == 6


def test_the_description_names_every_file(config, ready, folder):
    data = ready(config())
    described = json.loads(json.dumps(data.describe()))
    assert described["digest"] == data.digest
    (source,) = described["sources"]
    assert (source["name"], source["weight"], source["kind"]) == ("text", 1.0, "text")
    assert [file["path"] for file in source["files"]] == sorted(os.listdir(folder))
    assert all(len(file["sha256"]) == 64 for file in source["files"])
    assert source["splits"]["train"]["num_tokens"] == data.sources[0].num_tokens


def test_a_damaged_folder_is_refused(config, ready):
    data = ready(config())
    data.verify()
    shard = data.folders[0] / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DamagedError, match="train-00000.bin"):
        ready(config()).verify()
    shutil.rmtree(data.folders[0])
    ready(config()).verify()


def test_an_altered_trained_tokenizer_is_refused(config, ready, tmp_path):
    shutil.rmtree(ready(config()).folders[0])
    (folder,) = (tmp_path / "cache").glob("tokenizer-????????????????")
    train_tokenizer(["something else"], 270).save_pretrained(folder)
    with pytest.raises(DamagedError, match="data.tokenizer=.*it is trained again"):
        ready(config())


def test_stopping_anywhere_leaves_nothing_half_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.build.BATCH_DOCUMENTS", 5)
    polls = []

    def stop_after(limit):
        polls.clear()
        return lambda: polls.append(None) or len(polls) > limit

    prepare(config(), model_path=None, stop_requested=stop_after(10**9))
    total = len(polls)
    assert total > 200  # while hashing, training the tokenizer and writing
    for limit in [*range(0, total, 17), total - 1]:
        cfg = config(cache_dir=str(tmp_path / f"cache{limit}"))
        with pytest.raises(Interrupted):
            prepare(cfg, model_path=None, stop_requested=stop_after(limit))
        assert all(re.fullmatch("tokenizer-[0-9a-f]{16}", name) for name in leftovers(cfg))
        before = len(polls)
        assert prepare(cfg, model_path=None, stop_requested=stop_after(10**9)).digest
        assert len(polls) + min(before, 120) <= total + 8  # what was hashed is not read again


def test_a_full_disk_and_a_cache_that_cannot_be_written(config, ready, folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TokenDatasetWriter, "add", full)
        with pytest.raises(ConfigError, match="data.cache_dir=.*the disk is full"):
            ready(config())
    assert all(name.startswith("tokenizer-") for name in leftovers(config()))
    with pytest.raises(ConfigError, match="data.cache_dir=.*cannot be made"):
        ready(config(cache_dir=str(folder / "0000.txt" / "cache")))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(ConfigError, match="data.cache_dir=.*not writable"):
            ready(config())


def start(folder, tmp_path, hang):
    arguments = [folder, tmp_path / "cache", tmp_path / "log", hang]
    command = [sys.executable, "-m", "tests.trainer.data.builder", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def test_processes_that_start_at_once_build_once(folder, tmp_path):
    processes = [start(folder, tmp_path, hang=0.5) for _ in range(3)]
    results = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({digest for digest, _ in results}) == 1
    assert len((tmp_path / "log").read_text().split()) == 1


def test_a_killed_builder_holds_nobody_up(config, ready, folder, tmp_path):
    process = start(folder, tmp_path, hang=1000)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "cache").glob(".staging-*/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert len(list((tmp_path / "cache").glob(".staging-*"))) == 1
    data = ready(config())
    assert not list((tmp_path / "cache").glob(".staging-*"))
    data.verify()


def test_a_pretrained_model_brings_its_tokenizer(config, tmp_path):
    tokenizer = train_tokenizer(make_texts(20), 290)
    tokenizer.save_pretrained(tmp_path / "model")
    cfg = config(tokenizer_vocab_size=4096)
    data = prepare(cfg, model_path=str(tmp_path / "model"), stop_requested=lambda: False)
    assert len(data.tokenizer) == len(tokenizer)
    named = config(tokenizer=str(tmp_path / "model"), tokenizer_vocab_size=4096)
    again = prepare(named, model_path=None, stop_requested=lambda: False)
    assert again.digest == data.digest
    with pytest.raises(ConfigError, match="data.tokenizer_vocab_size=300: has no effect"):
        prepare(config(), model_path=str(tmp_path / "model"), stop_requested=lambda: False)


def test_a_tokenizer_is_trained_as_the_type_of_model_needs_it(config, ready, tmp_path):
    def of(model_type, **changes):
        settings = config(**changes), AutoConfig.for_model(model_type)
        return prepare(
            settings[0],
            model_path=None,
            stop_requested=lambda: False,
            model_config=settings[1],
        )

    plain, llama, qwen2 = ready(config()), of("llama"), of("qwen2")
    assert plain.digest == llama.digest != qwen2.digest
    assert type(qwen2.tokenizer).__name__ == "Qwen2Tokenizer"
    train_tokenizer(make_texts(20), 290).save_pretrained(tmp_path / "own")
    given = {"tokenizer": str(tmp_path / "own"), "tokenizer_vocab_size": 4096}
    assert len(of("llama", **given).tokenizer) == 290
    with pytest.raises(ConfigError, match="data.tokenizer=.*own: .*of a qwen2"):
        of("qwen2", **given)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """A folder with a tokenizer that puts its BOS before a text, as Gemma's does."""
    folder = tmp_path_factory.mktemp("bos")
    backend = train_tokenizer(make_texts(20), 290).backend_tokenizer
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return str(folder)


def ids_of(data):
    (train,) = data.sources
    stream = train.read(0, train.num_tokens).tolist()
    starts = [*train.document_starts(0, train.num_tokens).tolist(), train.num_tokens]
    return [stream[a:b] for a, b in zip(starts, starts[1:], strict=False)]


def test_documents_begin_with_a_bos_where_the_tokenizer_adds_one(config, ready, with_bos, tmp_path):
    given = {"tokenizer": with_bos, "tokenizer_vocab_size": 4096}
    auto, on, off = (ready(config(**given, add_bos=value)) for value in ("auto", True, False))
    assert (auto.add_bos, on.add_bos, off.add_bos) == (True, True, False)
    assert auto.digest == on.digest != off.digest
    bos = auto.tokenizer.bos_token_id
    assert [[bos, *ids] for ids in ids_of(off)] == ids_of(auto)
    assert all(ids.count(bos) == 1 for ids in ids_of(auto))
    trained = ready(config())
    assert not trained.add_bos and ready(config(add_bos=False)).digest == trained.digest
    with pytest.raises(ConfigError, match="data.add_bos=True: .* has no BOS token"):
        ready(config(add_bos=True))
    with pytest.raises(ConfigError, match="data.add_bos=maybe: must be one of"):
        check_settings(config(add_bos="maybe"), "data")
    tokens = {"kind": TOKENS, "path": str(auto.folders[0]), "tokenizer_vocab_size": 4096}
    assert ready(config(**tokens)).add_bos
    with pytest.raises(ConfigError, match="data.add_bos=False: .*begin with a BOS token"):
        ready(config(**tokens, add_bos=False))
    with pytest.raises(ConfigError, match="data.parse_special_tokens=True: .*were read as text"):
        ready(config(**tokens, parse_special_tokens=True))


def test_spelled_special_tokens_are_text_unless_asked_for(config, ready, with_bos, tmp_path, capfd):
    spelled = [f"<bos>{text}<|endoftext|>" for text in make_texts(40)]
    folder = write_folder(tmp_path / "spelled", spelled + make_texts(10, seed=3))
    given = {"path": str(folder), "tokenizer": with_bos, "tokenizer_vocab_size": 4096}
    text = ready(config(**given))
    said = capfd.readouterr().err
    assert "40 documents spell special tokens such as <bos>" in said
    assert "data.parse_special_tokens=true" in said
    bos, eos = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
    assert all(ids.count(bos) == ids.count(eos) == 1 for ids in ids_of(text))
    kept = [text.tokenizer.decode(ids[1:-1]) for ids in ids_of(text)]
    assert any(document in spelled for document in kept)
    parsed = ready(config(**given, parse_special_tokens=True))
    assert "spell special tokens" not in capfd.readouterr().err
    assert parsed.digest != text.digest
    assert all(ids.count(bos) == ids.count(eos) == 1 for ids in ids_of(parsed))  # none is doubled
    assert sum(map(len, ids_of(parsed))) < sum(map(len, ids_of(text)))


def test_what_was_prepared_before_is_found_again(config, ready, tmp_path):
    """The names of the folders are those that version 09cbf22 gave."""
    texts = [f"{n} the loss of a step is summed over tokens {n * n} é 😀" for n in range(40)]
    jsonl = tmp_path / "jsonl"
    jsonl.mkdir()
    for number in (0, 1):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::2])
        (jsonl / f"{number}.jsonl").write_text(rows)
    (folder := tmp_path / "plain").mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    assert ready(config(path=str(folder))).folders[0].name == "5aff7f4ed47e51f1"
    for_old, for_new = (
        prepare(
            config(kind=SourceKind.jsonl, path=str(jsonl)),
            model_path=None,
            stop_requested=lambda: False,
            begun_before=begun_before,
        )
        for begun_before in (True, False)
    )
    assert for_old.folders == for_new.folders
    assert for_new.folders[0].name == "c6e9fdc24d0a11ad"


def test_tokens_are_opened_as_they_are(config, ready, tmp_path):
    data = ready(config())
    moved = shutil.copytree(data.folders[0], tmp_path / "moved")
    tokens = {"kind": TOKENS, "path": str(moved), "tokenizer_vocab_size": 4096}
    again = ready(config(**tokens, cache_dir=str(tmp_path / "unused")))
    assert again.digest == data.digest and again.folders == [moved]
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ConfigError, match="data.tokenizer=train: .*holds tokens already"):
        ready(config(**tokens, tokenizer="train"))
    train_tokenizer(["other"], 280).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="made by another tokenizer"):
        ready(config(**tokens, tokenizer=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="data.path=.*is not a prepared token dataset"):
        ready(config(**tokens | {"path": str(tmp_path)}))


def mixture(cfg, sources, **changes):
    names = {field.name for field in dataclasses.fields(MixtureDataConfig)} - {"sources"}
    settings = {name: getattr(cfg, name) for name in names}
    return MixtureDataConfig(**settings | changes, sources=sources)


def test_a_mixture_has_one_tokenizer_and_a_folder_for_each_source(config, ready, tmp_path):
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"body": text}) + "\n" for text in make_texts(80, seed=2))
    )
    jsonl = SourceConfig(
        kind=SourceKind.jsonl, path=str(tmp_path / "b.jsonl"), column="body", weight=3.0
    )
    text = SourceConfig(kind=TEXT, path=config().path)
    data = ready(mixture(config(), {"books": text, "web": jsonl}))
    assert (data.names, data.weights) == (["books", "web"], [1.0, 3.0])
    fingerprints = {source.manifest["tokenizer_fingerprint"] for source in data.sources}
    assert fingerprints == {data.tokenizer_fingerprint} and len(set(data.folders)) == 2
    assert sum(source.num_documents for source in data.sources + data.validation) == 200
    heavier = ready(
        mixture(config(), {"books": text, "web": dataclasses.replace(jsonl, weight=4.0)})
    )
    assert heavier.folders == data.folders and heavier.digest != data.digest
    ready_made = SourceConfig(kind=TOKENS, path=str(data.folders[0]))
    again = ready(mixture(config(), {"books": ready_made, "web": jsonl}, tokenizer_vocab_size=4096))
    assert again.tokenizer_fingerprint == data.tokenizer_fingerprint
    assert again.folders[0] == data.folders[0]


def test_settings_that_make_no_sense(config, ready, tmp_path):
    cases = [
        (config(validation_fraction=0.0), "data.validation_fraction=0.0: must be above 0"),
        (config(validation_fraction=1.0), "data.validation_fraction=1.0"),
        (config(validation_fraction=1e-9), "of 120 documents of data none is left for the vali"),
        (config(shard_tokens=0), "data.shard_tokens=0"),
        (config(weight=2.0), "data.weight=2.0: has no effect with one source"),
        (config(tokenizer_vocab_size=10), "data.tokenizer_vocab_size=10"),
        (config(tokenizer=str(tmp_path / "no")), "data.tokenizer=.*no tokenizer can be loaded"),
        (mixture(config(), {}), "data.sources={}: a mixture needs sources"),
        (
            mixture(config(), {"a": SourceConfig(kind=TEXT, path="x", column="c")}),
            "data.sources.a.column=c: has no effect",
        ),
        (
            mixture(config(), {"a": SourceConfig(kind=TEXT, path=str(tmp_path / "no"))}),
            "data.sources.a.path=.*no such file",
        ),
    ]
    for cfg, message in cases:
        with pytest.raises(ConfigError, match=message):
            check_settings(cfg, "data")
            ready(cfg)
        assert not [name for name in leftovers(cfg) if not name.startswith("tokenizer-")]


def test_a_text_of_nothing_but_blanks(config, ready, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n \n")
    with pytest.raises(ConfigError, match="none of its documents has any text"):
        ready(config(path=str(tmp_path / "blank.txt")))


def test_a_large_source_trains_the_tokenizer_on_a_fixed_part(config, ready, monkeypatch):
    seen = []
    monkeypatch.setattr("trainer.data.prepare.TOKENIZER_TRAINING_BYTES", 4000)

    def train(texts, size, family):
        seen.append(list(texts))
        return train_tokenizer(seen[-1], size, family)

    monkeypatch.setattr("trainer.data.prepare.train_tokenizer", train)
    data = ready(config())
    held_out = decoded(TokenDataset.open(data.folders[0], "validation"), data.tokenizer)
    assert 0 < sum(map(len, seen[0])) < 8000 and not set(seen[0]) & set(held_out)


@pytest.mark.parametrize("fraction", [0.02, 0.98])
@pytest.mark.parametrize(("distinct", "copies"), [(1, 1), (1, 10), (2, 1), (2, 5), (3, 1), (4, 9)])
def test_the_fraction_that_is_advised_parts_the_documents(
    config, ready, tmp_path, distinct, copies, fraction
):
    rows = [json.dumps({"text": f"document {i} of few"}) for i in range(distinct)] * copies
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    settings = {"kind": SourceKind.jsonl, "path": str(tmp_path / "rows.jsonl"), "column": "text"}
    with pytest.raises(ConfigError) as refused:
        ready(config(**settings, validation_fraction=fraction))
    advised = re.search(r"set data\.validation_fraction=(\S+),", str(refused.value))
    if distinct == 1:
        assert advised is None and "add other documents" in str(refused.value)
        assert ("the same text" in str(refused.value)) == (copies > 1)
        return
    data = ready(config(**settings, validation_fraction=float(advised[1])))
    [train], [held_out] = data.sources, data.validation
    assert (train.num_documents + held_out.num_documents) == distinct * copies
    wanted = copies if fraction < 0.5 else (distinct - 1) * copies
    assert held_out.num_documents == wanted
