"""The files in a real llama.cpp, in an environment of its own: `make test-llama`.

SPOTFORGE_LLAMA_PYTHON names its Python.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from compression.scheme import Scheme
from compression.targets.gguf import load
from tests.compression.targets.test_gguf import (
    LLAMA_3,
    compressed,
    gpt2,
    llama_3,
    qwen2,
    save_parent,
    save_sentencepiece,
    tokenizer_with,
)

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif("SPOTFORGE_LLAMA_PYTHON" not in os.environ, reason="SPOTFORGE_LLAMA_PYTHON"),
]
TEXTS = [
    "The cat's on the mat,  isn't it? I'LL see.",
    " 12 dogs ran 3,456.78 km in 2024!\n\n\n  And\tthen\r\n the   fish  ",
    "naïve café — «где?» 你好，世界 🙂 x²+½",
    "a<|endoftext|>b",
    "def f(x):\n    return {'a': [1, 22, 333]}  # done\n",
    "",
]


def ask(artifact, requests):
    """What llama.cpp's server answers."""
    python, script = os.environ["SPOTFORGE_LLAMA_PYTHON"], Path(__file__).with_name("llama_cpp.py")
    done = subprocess.run(
        [python, script, artifact / "model.gguf"],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


CASES = {
    "llama": ("llama", {}),
    "llama-tied-heads": ("llama", dict(tie_word_embeddings=True, head_dim=32)),
    "llama-rope3-bias": (
        "llama",
        dict(rope_parameters=LLAMA_3, attention_bias=True, mlp_bias=True, num_key_value_heads=4),
    ),
    "mistral": ("mistral", dict(sliding_window=128)),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", dict(head_dim=32)),
}


@pytest.mark.parametrize("model_type, fields", CASES.values(), ids=CASES)
@pytest.mark.parametrize("scheme", [None, Scheme(bits=8), Scheme(bits=4, group_size=32)])
def test_the_next_token_is_as_likely_as_in_transformers(model_type, fields, scheme, tmp_path):
    parent = save_parent(tmp_path / "parent", model_type, **fields)
    _, artifact, _ = compressed(parent, tmp_path, scheme, torch.float32)
    prompts = torch.randint(1, 300, (3, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = load(artifact)(prompts).logits[:, -1].log_softmax(-1)
    # Whatever is likeliest, a whole character is chosen: others are sent without probabilities.
    letter = AutoTokenizer.from_pretrained(parent).convert_tokens_to_ids("a")
    settings = dict(n_predict=1, n_probs=100, temperature=0, logit_bias=[[letter, 1000]])
    answers = ask(artifact, [("completion", settings | {"prompt": p}) for p in prompts.tolist()])
    # With codes, llama.cpp rounds inputs too: to int8, a scale for 32.
    tolerance = 1e-5 if scheme is None else 0.06
    for row, answer in zip(wanted, answers, strict=True):
        top = answer["completion_probabilities"][0]["top_logprobs"]
        assert len(top) == 100
        found = torch.tensor([t["logprob"] for t in top])
        torch.testing.assert_close(found, row[[t["id"] for t in top]], atol=tolerance, rtol=0)


def save_tokenizer(folder, kind):
    if kind == "sentencepiece":
        return save_sentencepiece(folder)
    changes = {
        "smollm": lambda described: None,
        "gpt-2": gpt2,
        "llama-bpe": llama_3,
        "qwen2": qwen2,
    }
    tokenizer_with(folder, changes[kind])
    return 320


@pytest.mark.parametrize("kind", ["smollm", "gpt-2", "llama-bpe", "qwen2", "sentencepiece"])
def test_texts_become_the_same_tokens(kind, tmp_path):
    vocab_size = save_tokenizer(tmp_path / "tokenizer", kind)
    parent = save_parent(tmp_path / "parent", vocab_size=max(vocab_size, 320))
    save_tokenizer(parent, kind)
    _, artifact, _ = compressed(parent, tmp_path, Scheme(bits=8))
    tokenizer = AutoTokenizer.from_pretrained(parent)
    requests = [("tokenize", {"content": t, "add_special": True}) for t in TEXTS]
    for text, answer in zip(TEXTS, ask(artifact, requests), strict=True):
        assert answer["tokens"] == tokenizer(text).input_ids, text
