"""Conversations as a chat model reads them: rendered by its chat template with special tokens.

Shapes: N samples of T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from core.errors import ConfigError
from trainer.data.messages import for_template

KEY = "calibration.messages"
_HELD_OUT = 0.2  # share of the conversations that are for the evaluation
_MARK = "0123456789"  # placeholder of the user's text in a rendered prompt


def read_samples(
    path: Path, model: Path, sizes: tuple[int, int], max_seq_len: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns samples for the calibration and for the evaluation, from a file of conversations.

    The digest of a conversation decides whether it is for calibration or evaluation, so that a
    repeated conversation cannot be in both. The conversations of a side are concatenated and cut
    into samples.

    Args:
        path: File of JSON lines, each with `messages`: a list of `{"role": ..., "content": ...}`.
        model: Folder of the model, whose tokenizer has a chat template.
        sizes: Largest number of calibration samples and of evaluation samples.
        max_seq_len: Number of tokens T of a sample.
        seed: Seed of the order of the calibration conversations.

    Returns:
        Two int64 tensors (N, T), with fewer samples if there are not enough conversations.

    Raises:
        ConfigError: The file or the template is missing, the template refuses a conversation, or
            one side has too few tokens for one sample.
    """
    tokenizer = load_chat_tokenizer(model)
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    for number, messages in _conversations(path):
        text = render(tokenizer, messages, False, KEY, f"{path}:{number}")
        # 48 bits of the digest as a number in [0, 1), the same on every machine.
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / (1 << 48)
        sides[draw < _HELD_OUT].append(_ids(tokenizer, text))
    order = torch.randperm(len(sides[0]), generator=torch.Generator().manual_seed(seed))
    calibration = _cut([sides[0][i] for i in order.tolist()], sizes[0], max_seq_len)
    evaluation = _cut(sides[1], sizes[1], max_seq_len)
    for what, found, ids in (
        ("calibration", calibration, sides[0]),
        ("held-out", evaluation, sides[1]),
    ):
        if not len(found):
            rule = f"{what} conversations have {sum(map(len, ids))} tokens, a sample {max_seq_len}"
            fix = "add conversations, or lower calibration.max_seq_len"
            raise ConfigError(KEY, path, rule, fix)
    return calibration, evaluation


def load_chat_tokenizer(model: Path) -> Any:
    """Returns a model's tokenizer.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if tokenizer.chat_template is None:
        rule = f"{model} has no chat template"
        raise ConfigError(KEY, "...", rule, "give text: data=text data.path=notes.txt")
    return tokenizer


def query_prefix(tokenizer: Any) -> list[int]:
    """Returns the token ids that a chat template puts before the text of a user.

    Raises:
        ConfigError: The template refuses a user's message, or leaves its text out.
    """
    said = [{"role": "user", "content": _MARK}]
    before, mark, _ = render(tokenizer, said, True, "data", "null").partition(_MARK)
    if not mark:
        rule = "the model's chat template leaves out the text of the user"
        raise ConfigError("data", "null", rule, "give data=text data.path=notes.txt")
    return _ids(tokenizer, before)


def answer_prompt(tokenizer: Any, query: str) -> list[int]:
    """Returns the token ids of a user's message, followed by the template's generation prompt."""
    said = [{"role": "user", "content": query}]
    return _ids(tokenizer, render(tokenizer, said, True, "data", "null"))


def render(
    tokenizer: Any, messages: list[dict[str, Any]], is_prompt: bool, key: str, value: object
) -> str:
    """Returns a conversation as text.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: The conversation, in OpenAI's format.
        is_prompt: True if the text ends with the template's generation prompt.
        key: Key to name in an error.
        value: Value to name in an error.

    Raises:
        ConfigError: The template refuses the conversation.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_prompt
        )
    except Exception as e:  # a template is a program of the model's author and may raise anything
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        rule = f"the model's chat template refuses the conversation: {reason}"
        raise ConfigError(key, value, rule, "give conversations that fit the template") from e
    return text


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a rendered text."""
    # The template has already written the special tokens, BOS among them.
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _conversations(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yields each conversation with its line number."""
    fix = 'give JSON lines: {"messages": [{"role": "user", "content": "..."}, ...]}'
    try:
        with path.expanduser().open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                messages = row.get("messages") if isinstance(row, dict) else None
                if not isinstance(messages, list) or not all(map(_is_message, messages)):
                    rule = "`messages` is missing, or not a list of objects with role and content"
                    raise ConfigError(KEY, f"{path}:{number}", rule, fix)
                yield number, [_for_template(m, f"{path}:{number}", fix) for m in messages]
    except ValueError as e:
        raise ConfigError(KEY, path, f"is not valid JSON lines: {e}", fix) from e
    except OSError as e:
        raise ConfigError(KEY, path, e.strerror or str(e), fix) from e


def _for_template(message: dict[str, Any], where: str, fix: str) -> dict[str, Any]:
    try:
        return for_template(message)
    except ValueError as e:
        raise ConfigError(KEY, where, str(e), fix) from e


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _cut(conversations: list[list[int]], num_samples: int, max_seq_len: int) -> Tensor:
    stream = torch.tensor([id_ for ids in conversations for id_ in ids], dtype=torch.int64)
    num_samples = min(num_samples, len(stream) // max_seq_len)
    return stream[: num_samples * max_seq_len].view(num_samples, max_seq_len)
