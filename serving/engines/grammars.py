"""JSON schemas as grammars over a model's tokens, by llguidance."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_KEPT = 32
# A chain of references takes a few KiB a link, and a stack that ends takes the process with it.
# Memory that is never touched costs nothing.
_STACK_BYTES = 256 * 2**20
# Without an end, some models never stop: a space, or a line's end with its indentation.
_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r" |\r?\n[ \t]{0,8}"}


class Grammars:
    """Compiles schemas, one after the other, on a thread of its own.

    Most take a millisecond; the worst that the gateway lets through, a second.

    Args:
        tokenizer: Of the model.
        vocab_size: V of the model's logits, which may be padded.
        eos: Tokens that end a text, at least one.
        tell: Called on that thread with a request's id and what became of its schema: a matcher at
            the text's beginning, or one line that says why there is none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        eos: list[int],
        tell: Callable[[str, LLMatcher | str], None],
    ) -> None:
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)
        self._limits = LLParserLimits(verbose_errors=False)
        self._tell = tell
        self._kept: OrderedDict[str, LLMatcher | str] = OrderedDict()
        self._wanted: SimpleQueue[tuple[str, dict[str, Any]]] = SimpleQueue()
        thread = threading.Thread(target=self._run, name="grammars", daemon=True)
        before = threading.stack_size(_STACK_BYTES)
        thread.start()
        threading.stack_size(before)

    def compile(self, name: str, schema: dict[str, Any]) -> None:
        """Begins to; `tell` says what became of it."""
        self._wanted.put((name, schema))

    def _run(self) -> None:
        while True:
            name, schema = self._wanted.get()
            text = json.dumps(schema)
            if text not in self._kept:
                self._kept[text] = self._compiled(text)
            self._kept.move_to_end(text)
            found = self._kept[text]
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            self._tell(name, found if isinstance(found, str) else found.deep_copy())

    def _compiled(self, schema: str) -> LLMatcher | str:
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            matcher.compute_bitmask()  # the first one takes long, and shows what no text satisfies
        except Exception as e:  # whatever it is, it is this schema's and not the engine's
            return _one_line(str(e))
        return _one_line(matcher.get_error()) if matcher.is_error() else matcher


def _one_line(error: str) -> str:
    return " ".join(error.split())[:200]
