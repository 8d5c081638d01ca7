"""Converts a Hugging Face tokenizer to llama.cpp's format, which has two kinds of BPE.

`gpt2`: byte-level BPE with merges; `pre` names the rule that splits text into words.
`llama`: SentencePiece's BPE, with a score for each token instead of merges: of all neighbours whose
concatenation is a token, the pair with the highest score is joined.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from core.errors import ConfigError
from trainer.data.tokenizer import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types

_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_LLAMA = _CONTRACTIONS + r"\p{N}{1,3}" + _REST
SPLIT_QWEN = _CONTRACTIONS + r"\p{N}" + _REST
# Rule that splits text, as in tokenizer.json -> its name in llama.cpp.
_PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (SPLIT_LLAMA, "bytes"): "llama-bpe",
    (SPLIT_QWEN, "bytes"): "qwen2",
}
_SPACE = "▁"  # SentencePiece's character for a space


@dataclass(frozen=True)
class Vocabulary:
    """Content of the fields `tokenizer.ggml.*` of a GGUF file.

    model: Kind of BPE, `gpt2` or `llama`.
        pre: Name of the rule that splits text before merging.
        tokens: Text of each token, by id.
        types: llama.cpp's type of each token, by id.
        merges: Pairs with a space between, in order of merging; for `gpt2`.
        scores: Score of each token, by id; for `llama`.
        special: Ids by llama.cpp's name: bos, eos, unknown, padding.
        adds: True for each of bos and eos that is put around a text.
        chat_template: Chat template in Jinja; None: there is none.
        chat_template: Jinja.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    chat_template: str | None = None


def read_vocabulary(folder: Path, vocab_size: int, key: str) -> Vocabulary:
    """Returns the vocabulary of a model's tokenizer.

    GGUF has no field for Unicode normalization (NFC, as in Qwen): text must be normalized already.

    Args:
        folder: Folder with a tokenizer.json.
        vocab_size: Number of rows of the embedding; ids without a token become unused tokens.
        key: Key of the setting, for errors.

    Raises:
        ConfigError: llama.cpp would split some texts into other tokens.
    """
    tokenizer = load_tokenizer(str(folder))
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise _refused(key, f"its tokenizer is of type {model['type']}, GGUF supports BPE only")
    if any(a["lstrip"] or a["rstrip"] or a["single_word"] for a in backend["added_tokens"]):
        raise _refused(key, "a special token of its tokenizer removes the space beside it")
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise _refused(key, f"its tokenizer has {max(by_id) + 1} tokens, its model {vocab_size}")
    added = {a["id"]: CONTROL if a["special"] else USER_DEFINED for a in backend["added_tokens"]}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    types = [added.get(i, NORMAL if i in by_id else UNUSED) for i in range(vocab_size)]
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    common: dict[str, Any] = {
        "tokens": tokens,
        "special": {name: index for name, index in special.items() if index is not None},
        "adds": _adds(tokenizer.backend_tokenizer, special, key),
        "chat_template": template,
    }
    merges = [tuple(merge) for merge in model["merges"]]
    if model["byte_fallback"]:
        return _sentencepiece(backend, merges, types, common, key)
    pre = _pre_tokenizer(backend)
    if pre is None or model["ignore_merges"] != (pre == "llama-bpe"):
        known = ", ".join(_PRE_TOKENIZERS.values())
        raise _refused(key, f"the rule by which its tokenizer splits text is not one of {known}")
    return Vocabulary("gpt2", pre, types=types, merges=[" ".join(m) for m in merges], **common)


def _refused(key: str, rule: str) -> ConfigError:
    return ConfigError(key, "gguf", rule, "use target=compressed_tensors")


def _adds(backend: Tokenizer, special: dict[str, int | None], key: str) -> dict[str, bool]:
    """Returns whether the tokenizer puts bos and eos around a text.

    It is tried out, since the rules of a post-processor can be written in many ways.
    """
    plain = backend.encode("a", add_special_tokens=False).ids
    ids = backend.encode("a").ids
    for bos in (False, True):
        for eos in (False, True):
            around = [special["bos"]] * bos + plain + [special["eos"]] * eos
            if ids == around:
                return {"bos": bos, "eos": eos}
    raise _refused(key, f"its tokenizer makes {ids} of {plain}, more than bos and eos around it")


def _pre_tokenizer(backend: dict[str, Any]) -> str | None:
    """Returns llama.cpp's name for the rule that splits text; None if it has none."""
    if backend["normalizer"] not in (None, {"type": "NFC"}):
        return None
    pre = backend["pre_tokenizer"] or {"type": None}
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    return _PRE_TOKENIZERS.get(tuple(map(_part, parts)))


def _part(part: dict[str, Any]) -> str:
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": has_regex}:
            return "ByteLevel" if has_regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}:
            return "" if part["invert"] else str(regex)
    return ""


def _sentencepiece(
    backend: dict[str, Any],
    merges: list[tuple[str, str]],
    types: list[int],
    common: dict[str, Any],
    key: str,
) -> Vocabulary:
    """Returns a vocabulary with scores that merge in the order of the merges.

    Scores can do so only if every pair that makes a token is among the merges, and all pairs that
    make the same token follow each other.
    """
    steps = (backend["normalizer"] or {}).get("normalizers", [])
    expected = [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ]
    if steps != expected or backend["pre_tokenizer"] is not None:
        raise _refused(key, "its tokenizer does not treat spaces as SentencePiece does")
    ids = {token: index for index, token in enumerate(common["tokens"])}
    if not all(byte in ids for byte in _BYTES):
        raise _refused(key, "its tokenizer lacks a token for some bytes")
    types = types.copy()
    for byte in _BYTES:
        types[ids[byte]] = BYTE
    if "unknown" in common["special"]:
        types[common["special"]["unknown"]] = UNKNOWN
    made = list(dict.fromkeys("".join(merge) for merge in merges))
    runs = sum("".join(a) != "".join(b) for a, b in zip(merges, merges[1:], strict=False)) + bool(
        merges
    )
    normal = {token for token, index in ids.items() if types[index] == NORMAL}
    pairs = {(t[:i], t[i:]) for t in normal for i in range(1, len(t))}
    if runs != len(made) or {p for p in pairs if normal.issuperset(p)} != set(merges):
        raise _refused(key, "its merges are not those of a SentencePiece vocabulary")
    # One score a token: the earlier it is made, the higher.
    scores = [0.0] * len(types)
    for rank, token in enumerate(made):
        scores[ids[token]] = -float(rank)
    return Vocabulary("llama", "default", types=types, scores=scores, **common)
