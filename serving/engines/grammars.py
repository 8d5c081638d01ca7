"""Compiles JSON schemas to grammars over a model's tokens, with llguidance."""

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

_KEPT = 32  # compiled schemas in the cache
# llguidance recurses: a chain of references takes a few KiB of stack a link, and a stack overflow
# kills the process. Memory of a stack that is never touched is not allocated.
_STACK_BYTES = 256 * 2**20
# Whitespace is bounded to a space, or a newline with its indentation: with unbounded whitespace
# some models never stop.
_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r" |\r?\n[ \t]{0,8}"}


class Grammars:
    """Compiles schemas one after the other in a separate thread.

    Most schemas take a millisecond; the worst that the gateway accepts take a second.

    Args:
        tokenizer: Tokenizer of the model.
        vocab_size: Size V of the model's logits, which may be padded.
        eos: Tokens that end a text, at least one.
        tell: Function that is called in that thread with a request's id and the result: a matcher
            at the beginning of the text, or the error in one line.
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
        # The stack size is a setting of the whole process, so it is set only for this thread.
        before = threading.stack_size(_STACK_BYTES)
        thread.start()
        threading.stack_size(before)

    def compile(self, name: str, schema: dict[str, Any]) -> None:
        """Queues a schema for compilation; `tell` gets the result."""
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
            # A copy, since a matcher has the state of one text.
            self._tell(name, found if isinstance(found, str) else found.deep_copy())

    def _compiled(self, schema: str) -> LLMatcher | str:
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            # The first mask takes long, so it is computed here and not within a step; it also
            # fails for a schema that no text satisfies.
            matcher.compute_bitmask()
        except Exception as e:  # any error concerns this schema and not the engine
            return _one_line(str(e))
        return _one_line(matcher.get_error()) if matcher.is_error() else matcher


def _one_line(error: str) -> str:
    return " ".join(error.split())[:200]
