"""Tokenizers: load one or train a byte-level BPE, and tell by a fingerprint if two are the same."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from monitoring.errors import ConfigError

EOS = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and EOS

KEY = "data.tokenizer"


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load a tokenizer that can end a document.

    Args:
        name: A folder (of a tokenizer or of a model) or a name on the hub.
        revision: Commit, tag or branch on the hub.

    Raises:
        ConfigError: Not found, not a fast tokenizer, or without an EOS token.
    """
    try:
        # By itself it would ask at the terminal whether to run code that lies beside a model.
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        fix = "give a folder that holds tokenizer.json, a hub name, or train"
        raise ConfigError(KEY, name, f"no tokenizer can be loaded: {reason}", fix) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        rule = f"{type(tokenizer).__name__} is not a fast tokenizer"
        raise ConfigError(KEY, name, rule, "give one that has a tokenizer.json")
    if tokenizer.eos_token_id is None:
        rule = "it has no EOS token, so documents could not be told apart"
        raise ConfigError(KEY, name, rule, "set eos_token in its tokenizer_config.json")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (GPT-2's regex, digits one by one); same texts, same tokenizer.

    All 256 bytes are in the alphabet, so every text comes back from its tokens unchanged.

    Args:
        texts: Training documents, read once.
        vocab_size: Largest number of tokens, EOS included; little text makes fewer.

    Raises:
        ConfigError: No room for 256 bytes and EOS.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        rule = f"a byte-level tokenizer has at least {MIN_VOCAB_SIZE} tokens"
        raise ConfigError("data.tokenizer_vocab_size", vocab_size, rule, "raise it")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) over all that decides a text's tokens, special tokens and chat template.

    It survives `save_pretrained` and loading, and does not depend on how the JSON is laid out.
    """
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["truncation"], backend["padding"]  # state of the last call, not of the tokenizer
    content = {
        "backend": backend,
        "special_tokens": {
            name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())
        },
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def vocab_size_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest token id, which is what an embedding needs (ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the backend for documents: no truncation, no padding, no special token out of text.

    A document that spells `<|endoftext|>` is a text about tokenizers, not the end of a document.
    """
    backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend
