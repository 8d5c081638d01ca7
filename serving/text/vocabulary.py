"""The tokens of a tokenizer: which are special, and the bytes of each."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """The tokens of a tokenizer, shared by all sequences.

    Args:
        tokenizer: Tokenizer without truncation and padding.

    Attributes:
        special: Texts of the special tokens, which `decode` leaves out, by id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = {id: token.content for id, token in added.items() if token.special}
        self._kinds = _kinds(tokenizer.decoder)

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens at the beginning of a text, without special tokens."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def is_byte(self, token: int) -> bool:
        """Returns whether a token is a single byte, a part of a character of several tokens."""
        return "ByteFallback" in self._kinds and self._byte(token) is not None

    def bytes_of(self, token: int) -> bytes | None:
        """Returns the bytes of a token; None: they depend on the tokens before it."""
        if (text := self.special.get(token)) is not None:
            return text.encode()
        if "ByteLevel" in self._kinds:
            name = self._tokenizer.id_to_token(token) or ""
            table = self._byte_of_character
            if all(character in table for character in name):
                return bytes(table[character] for character in name)
            return name.encode()  # the name of an added token is its text
        return self._byte(token) if "ByteFallback" in self._kinds else None

    def _byte(self, token: int) -> bytes | None:
        found = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or "")
        return bytes.fromhex(found[1]) if found else None

    @cached_property
    def _byte_of_character(self) -> dict[str, int]:
        """GPT-2's table of bytes: printable ones are themselves, the others U+0100 and up."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        table = {chr(byte): byte for byte in printable}
        return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _kinds(decoder: Any) -> set[str]:
    """Returns the types of a decoder and of the decoders in it."""
    if decoder is None:
        return set()
    described = json.loads(decoder.__getstate__())
    return {part["type"] for part in [described, *described.get("decoders", ())]}
