"""Text to tokens and back: as transformers does it, a piece at a time."""

import json
import os
import random

import pytest
from transformers import AutoTokenizer

from core.errors import ConfigError, DamagedError
from serving.artifact import Format, resolve
from serving.engine import TokenChunk, TokenLogprob
from serving.text.codec import Chat, Decoder, Encoder, TextError
from serving.text.tokenizer import load
from serving.text.tools import ToolCallParser
from serving.text.vocabulary import Vocabulary
from tests.serving.conftest import save_model
from trainer.data.tokenizer import fingerprint

TEXTS = ["the cat sat", "naïve ☕ dogs", "🦊🦊 ran", "", "a\n\n b", "日本語 and नमस्ते"]


@pytest.fixture(scope="module")
def files(export, tmp_path_factory):
    return load(resolve(str(export)), tmp_path_factory.mktemp("cache"))


def test_tokens_and_fingerprint_are_transformers_own(export, files):
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert files.fingerprint == fingerprint(tokenizer)
    encoder = Encoder(files)
    for text in filter(None, TEXTS):
        assert encoder.encode(text) == tokenizer(text).input_ids
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": text}]
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert encoder.encode(Chat(messages)) == wanted["input_ids"]
    with pytest.raises(TextError):
        encoder.encode("")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(3))
def test_however_it_is_cut_the_text_is_the_same(files, text, seed):
    tokenizer, draw = files.tokenizer(), random.Random(seed)
    tokens, said = tokenizer.encode(text).ids, ""
    decoder = Decoder(Vocabulary(tokenizer), [])
    while tokens:
        count = draw.randint(1, 3)
        piece, tokens = tokens[:count], tokens[count:]
        said += decoder.feed(TokenChunk(piece)).text
        assert "\N{REPLACEMENT CHARACTER}" not in said
    assert said + decoder.feed(TokenChunk([], None, "stop")).text == text


def test_a_character_that_never_ends_is_told_at_the_end(files):
    tokenizer = files.tokenizer()
    tokens = tokenizer.encode("a🦊").ids[:-1]
    decoder = Decoder(Vocabulary(tokenizer), [])
    said = "".join(decoder.feed(TokenChunk([token])).text for token in tokens)
    assert said == "a"
    said += decoder.feed(TokenChunk([], None, "length")).text
    assert said == tokenizer.decode(tokens)


@pytest.mark.parametrize("stop", [["sat on"], ["t o"], ["zzz", " mat"], ["the"], ["cat s", "sat"]])
def test_stop_strings_whatever_tokens_they_are_made_of(files, stop):
    tokenizer = files.tokenizer()
    text = "the cat sat on a mat"
    decoder, said, reason = Decoder(Vocabulary(tokenizer), stop), "", None
    for token in tokenizer.encode(text).ids:
        chunk = decoder.feed(TokenChunk([token]))
        said, reason = said + chunk.text, chunk.finish_reason
        if reason is not None:
            break
    assert reason == "stop"
    assert said == text[: min(text.find(s) for s in stop if s in text)]


def test_what_only_looked_like_a_stop_string_is_told(files):
    decoder = Decoder(Vocabulary(files.tokenizer()), ["sat under"])
    said = ""
    for token in files.tokenizer().encode("the cat sat").ids:
        said += decoder.feed(TokenChunk([token])).text
    assert said in ("the cat ", "the cat")
    assert said + decoder.feed(TokenChunk([], None, "length")).text == "the cat sat"


def test_log_probabilities_carry_texts(files):
    tokens = files.tokenizer().encode("the cat").ids
    found = [TokenLogprob(-1.0, [(token, -1.0), (0, -2.0)]) for token in tokens]
    chunk = Decoder(Vocabulary(files.tokenizer()), []).feed(TokenChunk(tokens, found))
    assert "".join(told.token.text for told in chunk.logprobs) == "the cat"
    assert chunk.logprobs[0].top[1] == (0, "<|endoftext|>", -2.0, None)


def test_a_template_that_refuses_is_the_clients_mistake(files):
    template = "{{ raise_exception('roles must alternate') }}"
    strict = Encoder(type(files)(files.backend, {"default": template}, {}, ""))
    with pytest.raises(TextError, match="roles must alternate"):
        strict.encode(Chat([{"role": "user", "content": "a"}]))
    none = Encoder(type(files)(files.backend, {}, {}, ""))
    with pytest.raises(TextError, match="no chat template"):
        none.encode(Chat([{"role": "user", "content": "a"}]))
    plain = Encoder(type(files)(files.backend, {"default": "{{ messages }}"}, {}, ""))
    with pytest.raises(TextError, match="support tools"):
        plain.encode(Chat([{"role": "user", "content": "a"}], tools=[{}]))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_tool_calls_in_pieces(size):
    text = (
        'a <b> <tool_call>\n{"name": "f", "arguments": {"x": [1]}}\n</tool_call> then'
        '<tool_call>{"name": "g"}</tool_call><tool_call>no json</tool_call> <tool_ca'
    )
    parser, said, calls = ToolCallParser(), "", []
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for i, piece in enumerate(pieces):
        more, found = parser.feed(piece, i == len(pieces) - 1)
        said, calls = said + more, calls + found
    assert calls == [
        {"name": "f", "arguments": '{"x": [1]}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert said == "a <b>  then<tool_call>no json</tool_call> <tool_ca"


def test_artifacts_are_found_and_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "demo" / "export"
    save_model(folder)
    by_run, by_folder = resolve("demo"), resolve(str(folder))
    assert by_run.digest == by_folder.digest and by_run.format is Format.huggingface
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert resolve("demo").digest != by_run.digest
    for name in ("nothing", "", "a\0b", "runs/demo/checkpoints"):
        with pytest.raises(ConfigError):
            resolve(name)
    (folder / "lineage.json").write_text('{"files": {"config.json": {"sha256": "0"}}}')
    with pytest.raises(DamagedError, match="config.json is not as lineage.json lists it"):
        resolve("demo")


def test_weights_that_no_engine_loads_are_refused_at_once(tmp_path):
    folder = tmp_path / "m"
    save_model(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    resolve(str(folder))
    shard = sorted(folder.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DamagedError, match=f"{shard.name} is cut off"):
        resolve(str(folder))
    shard.unlink()
    with pytest.raises(DamagedError, match=f"index.json .*missing, such as {shard.name}"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("file", "content", "rule"),
    [
        ("lineage.json", {"files": 3}, "lineage.json does not have"),
        ("lineage.json", {"files": {"config.json": 3}}, "lineage.json does not have"),
        ("lineage.json", {"files": {"config.json": {}}}, "config.json is not as"),
        ("lineage.json", {"files": {}, "tokenizer_fingerprint": 4}, "lineage.json does not have"),
        ("lineage.json", "[" * 100_000, "is not JSON"),
        ("config.json", {"quantization_config": 3}, "quantization_config must be"),
        ("model.safetensors.index.json", {"weight_map": 3}, "has no weight_map"),
        (
            "model.safetensors.index.json",
            {"weight_map": {"a": "../m"}},
            "names files that are missing",
        ),
        ("generation_config.json", {"eos_token_id": "x"}, "its eos_token_id is neither"),
        ("generation_config.json", {"eos_token_id": [0, -1]}, "its eos_token_id is neither"),
        ("config.json", {"vocab_size": 200}, "its model's embedding 200 rows"),
        ("chat_template.jinja", "{% for", "its chat template is not valid"),
        ("tokenizer.json", "{", "its tokenizer does not load: no tokenizer can be loaded"),
    ],
)
def test_files_that_are_no_such_are_refused_in_a_line(tmp_path, file, content, rule):
    folder = tmp_path / "m"
    save_model(folder)
    path = folder / file
    if isinstance(content, dict) and path.is_file():
        content = json.loads(path.read_text()) | content
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=rule) as error:
        load(resolve(str(folder)), tmp_path / "cache")
    assert "\n" not in str(error.value) and error.value.key == "artifact"


def test_what_is_no_file_is_not_opened(tmp_path):
    save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(DamagedError, match="model.safetensors is neither a file"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["../outside", "/etc", "runs/../../outside", "link"])
def test_names_from_the_network_stay_below_their_folder(tmp_path, name):
    save_model(tmp_path / "outside")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="no such folder"):
        resolve(name, tmp_path / "root")
    with pytest.raises(ConfigError, match="no such folder"):
        resolve(str(tmp_path / "outside"), tmp_path / "root")


def test_a_model_that_ends_at_another_token_than_its_tokenizer_is_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("serving.text.tokenizer._log.warning", lambda *words: said.append(words))
    save_model(tmp_path / "m")
    load(resolve(str(tmp_path / "m")), tmp_path / "cache")
    assert not said
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2]}))
    load(resolve(str(tmp_path / "m")), tmp_path / "cache")
    [(text, _, named, end)] = said
    assert "eos_token_id" in text and (named, end) == ("'\"'", "<|endoftext|>")


def test_another_tokenizer_than_trainings_is_refused(tmp_path):
    save_model(tmp_path / "m")
    (tmp_path / "m" / "lineage.json").write_text('{"tokenizer_fingerprint": "abc", "files": {}}')
    with pytest.raises(ConfigError, match="not the one that it was trained with"):
        load(resolve(str(tmp_path / "m")), tmp_path / "cache")
