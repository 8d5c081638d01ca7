"""A model of which one block is in memory computes what the whole one does."""

import pytest
import torch

from compression.stream import BlockStream
from core.errors import ConfigError
from tests.compression.conftest import save_model

FIELDS = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4},
}


@pytest.mark.parametrize("model_type", FIELDS)
def test_the_logits_are_those_of_transformers(model_type, tmp_path):
    model = save_model(tmp_path, model_type, **FIELDS[model_type])
    input_ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    stream = BlockStream(tmp_path)
    stream.load_embedding()
    hidden = stream.embed(input_ids)
    for index, block in enumerate(stream.blocks):
        stream.load(index)
        hidden = stream.run(index, hidden)
        stream.release(index)
        assert all(p.is_meta for p in block.parameters())
    stream.load_head()
    with torch.no_grad():
        assert torch.equal(stream.logits(hidden), model(input_ids).logits)


def test_nothing_but_the_block_at_hand_is_in_memory(tmp_path):
    save_model(tmp_path)
    stream = BlockStream(tmp_path)
    stream.load(1)
    held = sum(p.numel() for p in stream.model.parameters() if not p.is_meta)
    of_block = sum(p.numel() for p in stream.blocks[1].parameters())
    assert held == of_block + 64  # and the final norm


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    model = save_model(tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    stream = BlockStream(tmp_path)
    stream.load(0)
    with pytest.raises(ConfigError, match=r"layers.1.mlp.up_proj.weight is NaN"):
        stream.load(1)
