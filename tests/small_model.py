"""A random Llama (or one like it) as a Hugging Face folder, with a tokenizer of 300 tokens."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.data.tokenizer import train_tokenizer


def save_model(folder, texts, model_type="llama", seed=0, gain=4.0, chat_template=None, **fields):
    """Writes it; returns the model.

    Args:
        folder: Where.
        texts: That the tokenizer learns from.
        model_type: Of transformers.
        seed: Of the weights.
        gain: Times what they are at random, so that logits say something.
        chat_template: Of the tokenizer.
        fields: Of the configuration.
    """
    sizes = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**sizes, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain if parameter.ndim == 2 else 1.0)
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(texts, 300)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return model
