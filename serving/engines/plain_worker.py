"""transformers' ordinary forward and cache as an engine program, one sequence at a time.

    python -m serving.engines.plain_worker '{"folder": "runs/demo/export", ...}'

The program is for models that engines with batches cannot run, or compute wrongly. Every sequence
has a cache of the kind that its model creates itself; running sequences take turns of one token, so
that no sequence waits for another to end.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.process.json_lines import JsonLines
from serving.engine import TokenRequest
from serving.engines.loading import Settings
from serving.engines.torch_worker import TorchWorker, serve

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class _Sequence:
    """A running request, which is a `Row` of the sampler.

    Attributes:
        request_id: Id of the request.
        initial_tokens: Token ids of the prompt.
        max_tokens: New tokens, at most.
        steps: Generator that yields the logits of the next token, (V,), and is sent the token.
        generated_tokens: Tokens that were generated so far.
    """

    request_id: str
    initial_tokens: list[int]
    max_tokens: int
    steps: Generator[Tensor, int | None, None]
    generated_tokens: list[int] = field(default_factory=list)


class PlainWorker(TorchWorker):
    """The engine program with transformers' ordinary forward.

    Args:
        settings: Settings of the program.
        lines: Connection to the gateway.
    """

    def __init__(self, settings: Settings, lines: JsonLines) -> None:
        import transformers
        from transformers import GenerationConfig

        from serving.engines.forwards import embeds_text

        super().__init__(settings, lines, is_plain=True)
        # The model's own settings would change how requests sample, or the kind of their cache.
        self._model.generation_config = GenerationConfig()
        self._running: deque[_Sequence] = deque()
        # Each sequence may grow to a whole context, so only so many run at once.
        room = settings.kv_cache_tokens // self._max_context
        self._max_running = max(1, min(settings.max_running, room))
        name = f"plain transformers {transformers.__version__}"
        self._say_ready(name, self._max_running, embeds_text(self._model))

    def _begin(self, request: TokenRequest) -> None:
        steps = _steps_of(self._model, request.prompt, request.max_tokens)
        sequence = _Sequence(request.id, request.prompt, request.max_tokens, steps)
        self._running.append(sequence)

    def _cancel(self, name: str) -> None:
        self._running = deque(s for s in self._running if s.request_id != name)

    def _advance(self) -> None:
        """Generates one token of the sequence whose turn it is."""
        if not self._running:
            return
        sequence = self._running.popleft()
        name = sequence.request_id
        try:
            token = self._next_token(sequence)
        except Exception as e:  # any error concerns this request and not the engine
            self._forget(name)
            error = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
            self._lines.say("failed", {"id": name, "error": error})
            return
        sequence.generated_tokens.append(token)
        is_stopped = token in self._eos and not self._requests[name].ignore_eos
        is_ended = is_stopped or len(sequence.generated_tokens) == sequence.max_tokens
        if not is_ended:
            self._running.append(sequence)
        tokens: dict[str, Any] = {}
        finished: list[tuple[str, str]] = []
        self._collect(name, [token], is_ended, tokens, finished)
        self._say_step(tokens, finished)

    def _next_token(self, sequence: _Sequence) -> int:
        import torch

        if self._adapters is not None:
            self._adapters.use(self._requests[sequence.request_id].adapter)
        generated = sequence.generated_tokens
        with torch.no_grad():
            scores = sequence.steps.send(generated[-1] if generated else None).unsqueeze(0)
            return int(self._sampler(scores, [sequence]))

    def _check(self) -> None:
        pass  # this engine has no thread that could have ended

    def _paused(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _kv_cache_usage(self) -> float:
        tokens = sum(len(s.initial_tokens) + len(s.generated_tokens) for s in self._running)
        return round(tokens / (self._max_running * self._max_context), 4)


def _steps_of(
    model: Any, prompt: list[int], max_tokens: int
) -> Generator[Tensor, int | None, None]:
    """Returns the generator of a sequence, with inputs and cache prepared as by `generate`."""
    import torch
    from transformers import GenerationConfig

    ids = torch.tensor([prompt], device=model.device)
    steps: Generator[Tensor, int | None, None] = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=max_tokens),
        custom_generate=_steps,
    )
    return steps


def _steps(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **kwargs: Any,
) -> Generator[Tensor, int | None, None]:
    """Yields the logits of each next token and is sent the token that was chosen.

    This is the loop of transformers' `_sample` (generation/utils.py) without its sampling.
    """
    import torch

    from serving.engines.internals import inputs_after

    length = None  # of the new inputs: None is the whole prompt; then 1, a token
    while True:
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, is_first_iteration=length is None, **kwargs
        )
        outputs = model(**inputs, return_dict=True)
        kwargs = inputs_after(model, outputs, kwargs)
        logits = outputs.logits[0, -1].float()
        del outputs
        token = yield logits
        input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], dim=-1)
        length = 1 if kwargs["use_cache"] else None


if __name__ == "__main__":
    serve(PlainWorker, sys.argv[1:])
