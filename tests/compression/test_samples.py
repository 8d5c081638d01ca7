"""Text to calibrate with and to compare on."""

import dataclasses
import functools
import json

import pytest
import torch
from transformers import AutoTokenizer

from compression.command import COMPRESSION
from compression.samples import check_no_overlap, data_config, draw_samples, sample_tokens
from core.errors import ConfigError, Interrupted
from tests.compression.conftest import save_model, sentences
from tests.words import last_of_each
from trainer.data.messages import for_template


def settings(*words):
    parent = [] if any(word.startswith("parent.") for word in words) else ["parent.model=x"]
    return COMPRESSION.compose([*parent, *words])


def of_text(text, *words):
    return settings(
        "data=jsonl", f"data.path={text}", "data.column=text", "data.max_seq_len=32", *words
    )


def draw(parent, text, *words):
    return draw_samples(of_text(text, *words), parent, lambda: False)


def test_the_same_seed_draws_the_same(parent, text):
    words = ("calibration.num_samples=8", "calibration.min_tokens=100", "evaluation.num_samples=3")
    first, again = draw(parent, text, *words), draw(parent, text, *words)
    assert torch.equal(first.calibration, again.calibration)
    assert first.calibration.shape == (8, 32) and first.evaluation.shape == (3, 32)
    other = draw(parent, text, *words, "seed=1")
    assert not torch.equal(first.calibration, other.calibration)
    assert torch.equal(first.evaluation, other.evaluation)


def test_no_sample_comes_twice(parent, text):
    samples = draw(parent, text, "calibration.num_samples=100000", "calibration.min_tokens=100")
    rows = {tuple(row) for row in samples.calibration.tolist()}
    assert len(rows) == len(samples.calibration) < 1000


def test_too_little_is_refused(parent, text):
    with pytest.raises(ConfigError, match="calibration.min_tokens=4096.*add data"):
        draw(parent, text, "calibration.num_samples=4", "recipe=int4_gptq")
    draw(parent, text, "calibration.num_samples=4")  # which rounding does not look at


def test_text_to_compare_on_that_was_calibrated_with_is_refused():
    calibration = torch.randint(1000, (4, 256), generator=torch.Generator().manual_seed(0))
    evaluation = torch.randint(1000, (4, 256), generator=torch.Generator().manual_seed(1))
    check_no_overlap(calibration, evaluation)
    evaluation[2] = calibration[1].roll(100)
    with pytest.raises(ConfigError, match="25% shared|19% shared"):
        check_no_overlap(calibration, evaluation)


def test_without_data_the_model_makes_its_text(parent):
    words = [
        f"parent.model={parent}",
        "calibration.num_samples=18",
        "calibration.max_seq_len=24",
        "calibration.min_tokens=100",
        "evaluation.num_samples=3",
    ]
    first, again = (draw_samples(settings(*words), parent, lambda: False) for _ in range(2))
    assert first.calibration.shape == (18, 24) and first.evaluation.shape == (3, 24)
    assert torch.equal(first.calibration, again.calibration) and first.digest == again.digest
    assert len({tuple(row) for row in first.calibration.tolist()}) == 18
    other = draw_samples(settings(*words, "seed=1"), parent, lambda: False)
    assert not torch.equal(first.calibration, other.calibration)
    with pytest.raises(ConfigError, match="calibration.max_seq_len=257: the model has 256"):
        draw_samples(
            settings(*last_of_each([*words, "calibration.max_seq_len=257"])), parent, lambda: False
        )
    with pytest.raises(Interrupted):
        draw_samples(settings(*words), parent, lambda: True)


def test_where_nobody_says_a_sample_is_no_longer_than_the_model(parent, tmp_path, capsys):
    assert sample_tokens(settings("parent.model=x"), parent) == 256
    assert "calibration.max_seq_len=256" in capsys.readouterr().out
    config = json.loads((parent / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 9999}))
    assert sample_tokens(settings("parent.model=x"), tmp_path) == 512
    assert sample_tokens(settings("calibration.max_seq_len=700"), tmp_path) == 700


@pytest.mark.parametrize("value", ["often", "true", "1.5", "0"])
def test_a_length_is_auto_or_a_number(value):
    for key in ("calibration.max_seq_len", "evaluation.prompt_tokens"):
        with pytest.raises(ConfigError, match=key):
            settings("parent.model=x", f"{key}={value}").check()


def test_there_is_no_healing_without_text():
    with pytest.raises(ConfigError, match="data=null: there is no text to train on"):
        data_config(settings("parent.model=x"))


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "chat"
    save_model(folder, num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A hundred; no one's words are another's."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    rows = []
    for number, said in enumerate(sentences(100)):
        turns = [("user", f"{number} {said}"), ("assistant", f"{said} {number}")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@functools.cache
def chat_settings(*words):
    sizes = ("calibration.num_samples=20", "calibration.min_tokens=100", "evaluation.num_samples=3")
    usual = ["calibration.messages=x", "calibration.max_seq_len=64", *sizes]
    return settings(*last_of_each([*usual, *words]))


def of_chat(path, *words):
    config = chat_settings(*words)
    calibration = dataclasses.replace(config.calibration, messages=str(path))
    return dataclasses.replace(config, calibration=calibration)


def test_conversations_are_rendered_by_the_models_template(chat_model, conversations):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    first, again = (
        draw_samples(of_chat(conversations), chat_model, lambda: False) for _ in range(2)
    )
    assert first.calibration.shape == (20, 64) and first.evaluation.shape == (3, 64)
    assert torch.equal(first.calibration, again.calibration) and first.digest == again.digest
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")  # one token, not eleven characters
    assert first.calibration[0, 0] == start and (first.evaluation == start).sum() > 3
    text = tokenizer.decode(first.calibration.flatten())
    assert "<|im_end|>\n<|im_start|>assistant\n" in text
    other = draw_samples(of_chat(conversations, "seed=1"), chat_model, lambda: False)
    assert not torch.equal(first.calibration, other.calibration)
    assert torch.equal(first.evaluation, other.evaluation)


def test_a_chat_model_takes_text_as_it_is(chat_model, text):
    words = ("calibration.num_samples=8", "calibration.min_tokens=100", "evaluation.num_samples=3")
    samples = draw(chat_model, text, *words)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    assert "im_start" not in tokenizer.decode(samples.calibration.flatten())


def test_content_in_parts_is_calibrated_on_as_one_text(chat_model, conversations, tmp_path):
    rows = [json.loads(line) for line in conversations.read_text().splitlines()]
    for row in rows:
        for message in row["messages"]:
            message["content"] += "\nmore"
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        for message in row["messages"]:
            texts = message["content"].split("\nmore")[0], "more"
            message["content"] = [{"type": "text", "text": text} for text in texts]
    parts = tmp_path / "parts.jsonl"
    parts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = (draw_samples(of_chat(p), chat_model, lambda: False) for p in (whole, parts))
    assert torch.equal(one.calibration, other.calibration) and one.digest == other.digest


def test_samples_of_conversations_are_no_longer_than_the_window(chat_model, conversations):
    words = of_chat(conversations, "calibration.max_seq_len=257", "evaluation.num_samples=1")
    with pytest.raises(ConfigError, match="calibration.max_seq_len=257: the model has 256"):
        draw_samples(words, chat_model, lambda: False)


def test_arguments_of_a_call_reach_the_template_as_an_object():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"city": "Pune"}'}}
    message = for_template({"role": "assistant", "content": None, "tool_calls": [call]})
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Pune"}
    assert message["content"] == "" and call["function"]["arguments"] == '{"city": "Pune"}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is no JSON lines"),
        ('{"text": "hello"}', "chat.jsonl:1: has no `messages`"),
        ('{"messages": [{"role": "user"}]}', "chat.jsonl:1: content is missing"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "chat.jsonl:1: content has a part of type image_url; only text",
        ),
        ('{"messages": ["hello"]}', "chat.jsonl:1: has no `messages`"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "add conversations"),
    ],
)
def test_what_is_no_conversation_is_refused(line, said, chat_model, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match="calibration.messages=.*" + said):
        draw_samples(of_chat(path), chat_model, lambda: False)


def test_conversations_need_a_template_that_takes_them(parent, chat_model, conversations, tmp_path):
    with pytest.raises(ConfigError, match="has no chat template; give text"):
        draw_samples(of_chat(conversations), parent, lambda: False)
    with pytest.raises(ConfigError, match="calibration.messages=.*No such file"):
        draw_samples(of_chat(tmp_path / "none.jsonl"), chat_model, lambda: False)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="chat.jsonl:1: the model's chat template .*no users"):
        draw_samples(of_chat(conversations), tmp_path, lambda: False)


def test_a_chat_model_makes_conversations(chat_model):
    words = [
        f"parent.model={chat_model}",
        "calibration.num_samples=18",
        "calibration.max_seq_len=48",
        "calibration.min_tokens=100",
        "evaluation.num_samples=3",
    ]
    first, again = (draw_samples(settings(*words), chat_model, lambda: False) for _ in range(2))
    assert first.calibration.shape == (18, 48) and torch.equal(first.evaluation, again.evaluation)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    for row in first.calibration:
        said = tokenizer.decode(row)
        assert said.startswith("<|im_start|>user\n")
        assert "<|im_end|>\n<|im_start|>assistant\n" in said
    assert len({tuple(row) for row in first.calibration.tolist()}) == 18
