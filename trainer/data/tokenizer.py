"""Loads tokenizers or trains a byte-level BPE, and compares tokenizers by a fingerprint.

`AutoTokenizer` chooses a class by a folder's tokenizer files, but for some types of models (qwen2,
qwen3_5) by the type alone: then that class's own code determines how text is split, whatever
tokenizer.json contains. A tokenizer that is trained for such a model splits text as the class does,
and an exported tokenizer is read back and compared before it is handed on.
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from core.errors import ConfigError
from core.folder import digest_of

EOS = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and EOS

KEY = "data.tokenizer"

# Texts on which tokenizers differ: digits, white space, code, scripts, composed and decomposed
# letters, emoji, line ends.
_PROBES = (
    "",
    " ",
    "Hello world, it's 2024-11-28; we'll pay $1,234,567.89 for 12345678901234567890 of them.",
    "  two  spaces,   three\tand a tab\t\n\n\n  \r\n after blank lines   \n",
    "def f(x: int) -> int:\n\treturn x**2 + 0x1F  # comment\n\n    if a != b and c >= 10:\n",
    "café cafe\u0301 naïve \u212bngström \ufb01 ½ Ⅷ İstanbul",
    "你好,世界 こんにちは 한국어 नमस्ते مرحبا שלום สวัสดี Привет",
    "😀 👨\u200d👩\u200d👧 🇮🇳 \u200b\u00a0\u3000\ufeff \x00\x07 \u2028",
    '<b>&amp;</b> https://example.org/a?b=c#d {"key": [1, 2.5e-3, null]} \\n <|im_start|> </s>',
)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that can end a document.

    Args:
        name: Folder (of a tokenizer or of a model) or name on the hub.
        revision: Commit, tag or branch on the hub.

    Raises:
        ConfigError: The tokenizer is not found, is not a fast one, or has no EOS token.
    """
    try:
        # Otherwise transformers asks at the terminal whether to run code that comes with a model.
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        fix = "give a folder with tokenizer.json, a hub name, or train"
        raise ConfigError(KEY, name, f"no tokenizer can be loaded: {reason}", fix) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        rule = f"{type(tokenizer).__name__} is not a fast tokenizer"
        raise ConfigError(KEY, name, rule, "give a tokenizer with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        rule = "has no EOS token, which separates documents"
        raise ConfigError(KEY, name, rule, "set eos_token in its tokenizer_config.json")
    return tokenizer


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    family: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast,
) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE trained on texts; the same texts make the same tokenizer.

    Text is split by GPT-2's regex with single digits, or as `family` splits it. All 256 bytes are
    in the alphabet, so every text is restored from its tokens unchanged, except for what `family`
    normalizes.

    Args:
        texts: Training documents, read once.
        vocab_size: Largest number of tokens, EOS included; little text makes fewer.
        family: Class of the tokenizer, as `tokenizer_family` returns it.

    Raises:
        ConfigError: The vocabulary is too small for 256 bytes and EOS.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        rule = f"a byte-level tokenizer has at least {MIN_VOCAB_SIZE} tokens"
        raise ConfigError("data.tokenizer_vocab_size", vocab_size, rule, "raise it")
    backend = Tokenizer(models.BPE())
    if family is PreTrainedTokenizerFast:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        own: Tokenizer = family().backend_tokenizer
        backend.normalizer, backend.pre_tokenizer = own.normalizer, own.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    settings = {"eos_token": EOS, "clean_up_tokenization_spaces": False}
    if family is PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return family(vocab=model["vocab"], merges=merges, **settings)


def tokenizer_family(model_config: PreTrainedConfig) -> type[PreTrainedTokenizerFast]:
    """Returns the class in which a tokenizer for a model from scratch is trained.

    It is `PreTrainedTokenizerFast`, which tokenizer.json describes completely, unless
    `AutoTokenizer` takes another class for every model of this type (transformers'
    `MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`). This is tested, since the list differs between
    versions.

    Raises:
        ConfigError: The class cannot be trained here.
    """
    general = train_tokenizer([], MIN_VOCAB_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        general.save_pretrained(folder)
        loaded = _loaded(folder, model_config)
        if fingerprint(loaded) == fingerprint(general):
            return PreTrainedTokenizerFast
        family: type[PreTrainedTokenizerFast] = type(loaded)
        try:
            trained = train_tokenizer([], MIN_VOCAB_SIZE, family)
            trained.save_pretrained(folder)
            again = _loaded(folder, model_config)
            trainable = fingerprint(again) == fingerprint(trained)
        except (TypeError, ValueError):  # the class is not built from a vocabulary and merges
            trainable = False
    if not trainable:
        rule = (
            f"transformers loads every tokenizer of a {model_config.model_type} as a "
            f"{family.__name__}, which cannot be trained here"
        )
        raise ConfigError(KEY, "train", rule, "give the tokenizer of a model of that type")
    return family


def check_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerFast, texts: Iterable[str] = ()
) -> None:
    """Checks that a model's folder, loaded by anyone, makes the tokens that were trained on.

    Args:
        folder: Folder with the tokenizer's files and the model's config.json.
        tokenizer: Tokenizer that prepared the data.
        texts: Documents to compare on, in addition to `_PROBES`.

    Raises:
        ConfigError: `AutoTokenizer` cannot load the folder, or the result makes other tokens or
        has
            other special tokens or another chat template.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise _other_tokenizer(folder, f"AutoTokenizer cannot load it: {reason}") from error
    difference = _difference(tokenizer, loaded, [*_PROBES, *texts])
    if difference is not None:
        rule = f"AutoTokenizer loads it as a {type(loaded).__name__}, which {difference}"
        raise _other_tokenizer(folder, rule)


def check_for_model(
    name: str, tokenizer: PreTrainedTokenizerFast, model_config: PreTrainedConfig
) -> None:
    """Checks before training what `check_tokenizer` would check in an export.

    Args:
        name: Origin of the tokenizer.
        tokenizer: Tokenizer with which the data is to be prepared.
        model_config: Config of the model from scratch that is to be trained.

    Raises:
        ConfigError: Beside this config, `AutoTokenizer` loads the files as another tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        loaded = _loaded(folder, model_config)
    if (difference := _difference(tokenizer, loaded, _PROBES)) is not None:
        rule = (
            f"transformers loads every tokenizer of a {model_config.model_type} as a "
            f"{type(loaded).__name__}, which {difference}"
        )
        fix = "set data.tokenizer=train, or choose another model.model_type"
        raise ConfigError(KEY, name, rule, fix)


def _loaded(folder: str, model_config: PreTrainedConfig) -> Any:
    """Returns the tokenizer that `AutoTokenizer` loads beside a model of this config."""
    return AutoTokenizer.from_pretrained(folder, config=model_config, trust_remote_code=False)


def _other_tokenizer(folder: Path, rule: str) -> ConfigError:
    fix = "load it with transformers.PreTrainedTokenizerFast, or export with another version of it"
    return ConfigError("export", folder, rule, fix)


def _difference(
    tokenizer: PreTrainedTokenizerFast, loaded: Any, texts: Iterable[str]
) -> str | None:
    """Returns how a loaded tokenizer differs; None if it does not."""
    if not isinstance(loaded, PreTrainedTokenizerFast):
        return "is not a fast tokenizer"
    documents = plain_backend(tokenizer), plain_backend(loaded)
    prompts = tokenizer.backend_tokenizer, loaded.backend_tokenizer
    # A text that spells all special tokens shows whether both recognize them alike.
    spelled = " and ".join(map(str, tokenizer.all_special_tokens))
    num_texts = num_other = 0
    example = ""
    for text in (*texts, f"{spelled} {spelled}"):
        num_texts += 1
        # A document is read without special tokens, a prompt with those that the tokenizer adds.
        made = [backend.encode(text, add_special_tokens=False).ids for backend in documents]
        asked = [backend.encode(text).ids for backend in prompts]
        if made[0] != made[1] or asked[0] != asked[1]:
            num_other += 1
            example = example or text
    if num_other:
        return f"makes other tokens of {num_other} of {num_texts} texts, such as {example!r:.60}"
    if loaded.get_vocab() != tokenizer.get_vocab():
        return f"has {len(loaded)} tokens, not the {len(tokenizer)} that were trained on"
    special = loaded.special_tokens_map  # its class may add tokens, such as one for padding
    for name, token in tokenizer.special_tokens_map.items():
        if special.get(name) != token:
            return f"has {special.get(name)!r} for its {name}, not {token!r}"
    if loaded.chat_template != tokenizer.chat_template:
        return "has another chat template"
    return None


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the SHA-256 (hex) of all that determines tokens, special tokens and chat template.

    It is the same after `save_pretrained` and loading, and for any layout of the JSON.
    """
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["truncation"], backend["padding"]  # state of the last call
    content = {
        "backend": backend,
        "special_tokens": {
            name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())
        },
        "chat_template": tokenizer.chat_template,
    }
    return digest_of(content)


def vocab_size_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns one more than the largest token id, which an embedding needs (ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Returns whether the tokenizer by default puts its BOS before a text."""
    ids: list[int] = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def plain_backend(
    tokenizer: PreTrainedTokenizerFast, parse_special_tokens: bool = False
) -> Tokenizer:
    """Returns a copy of the backend for documents, without truncation and padding.

    Args:
        tokenizer: Tokenizer that is copied and not changed.
        parse_special_tokens: True makes special tokens of text that spells them. By default a
            document that spells `<|endoftext|>` is a text about tokenizers, not the end of one.
    """
    backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not parse_special_tokens
    return backend


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Returns the texts of the special tokens, longest first."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    names = {token.content for token in added if token.special and token.content.strip()}
    return sorted(names, key=lambda name: (-len(name), name))
