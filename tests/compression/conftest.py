"""Small models with a tokenizer, made here, and the command."""

import sys

import pytest
import torch

from tests import small_model
from tests.words import last_of_each

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "ate", "fish", "while", "dogs", "ran", "far")


def sentences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(WORDS), (count, 8), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) + ".\n" for row in draws]


def save_model(folder, model_type="llama", seed=0, **fields):
    sizes = {"num_hidden_layers": 3, "max_position_embeddings": 256, **fields}
    return small_model.save_model(folder, sentences(200), model_type, seed, **sizes)


@pytest.fixture(scope="session")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "parent"
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(
        "".join(f'{{"text": "{s.strip()} {i}"}}\n' for i, s in enumerate(sentences(600)))
    )
    return path


SMALL = [
    "data.max_seq_len=32",
    "calibration.num_samples=16",
    "calibration.min_tokens=100",
    "evaluation.num_samples=6",
    "evaluation.prompt_tokens=8",
    "evaluation.new_tokens=2",
    "evaluation.rounds=1",
]


@pytest.fixture
def compress(capfd, monkeypatch, text, tmp_path):
    """Calls the command in this process; returns its exit code and what it said."""
    from compression.__main__ import main

    def call(*words, data=True):
        source = ["data=jsonl", f"data.path={text}", "data.column=text", *SMALL] if data else []
        given = last_of_each([*source, *map(str, words)])
        monkeypatch.setattr(sys, "argv", ["compression", *given])
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        code = main()
        said = capfd.readouterr()
        return code, said.out, said.err

    return call
