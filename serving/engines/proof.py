"""The check of an engine's scores against a plain forward, before the server is ready.

An engine that answers may still leave out a part of the model: a cap on attention, a position bias,
a window. So it generates greedily after a few prompts of several lengths, all in one batch and each
alone, and its log-probabilities are compared with those of a plain forward: eager attention, whole
sequences, no paged cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import ConfigError
from core.folder import write_file
from serving.engine import (
    Engine,
    EngineError,
    EngineInfo,
    Tie,
    TokenLogprob,
    TokenRequest,
    Unproven,
)

_log = logging.getLogger("spotforge.serving")

# Largest allowed difference in nats, root mean square over the tokens of one prompt. Rounding stays
# below; a part of the model that is left out makes a difference of tenths at the least. Quantized
# weights are computed from the same codes on both sides. Only an engine that also rounds the inputs
# of its matrix products, as OpenVINO and vLLM do for int8 and less, needs the wider bounds.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.08, "float16": 0.03, "int8": 0.5, "int4": 0.5}

_LENGTHS = (1, 6, 40, 130)  # of prompts: within a page of the KV cache, and over several pages
_NEW_TOKENS = 6
_ALTERNATIVES = 4
_BEYOND = 24  # tokens beyond a length at which a model behaves differently, such as its window
_CHANGES_AT = (
    "sliding_window",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
    "original_max_position_embeddings",
)
# Operations of a forward that take about a minute on a few cores; longer prompts are left out.
_CPU_WORK = 3e12
_MOST_TIES = 16  # ties of a sequence that are tried the other way; each takes a forward
_VERSION = 1  # of the check; part of the name under which a result is cached


class Asked(NamedTuple):
    """A sequence that a plain forward scores.

    Attributes:
        tokens: Token ids of prompt and answer.
        start: Index of the first new token.
        of: Token ids whose log-probabilities are wanted, for each new token.
        adapter: Name of the adapter that is added to the model; None: the model alone.
        turned: Ties that are decided the other way.
    """

    tokens: list[int]
    start: int
    of: list[list[int]]
    adapter: str | None
    turned: tuple[Tie, ...] = ()


class Scores(NamedTuple):
    """Log-probabilities that a plain forward gives at the position of each new token.

    Attributes:
        best: Log-probabilities of the likeliest token.
        of: Log-probabilities of the tokens that were asked for.
        ties: Ties that were found, the closest first.
    """

    best: list[float]
    of: list[list[float]]
    ties: tuple[Tie, ...] = ()


# The plain forward; raises EngineError if it fails.
Score = Callable[[list[Asked]], Awaitable[list[Scores]]]


@dataclass(frozen=True)
class Case:
    """A prompt and the adapter that is applied to it."""

    prompt: list[int]
    adapter: str | None = None


@dataclass(frozen=True)
class _Answer:
    """Tokens that an engine generated after a prompt, with their log-probabilities."""

    tokens: list[int]
    logprobs: list[TokenLogprob]


class Proof:
    """The check of one kind of engine on one artifact with its adapters.

    Args:
        cache: Folder in which the results of successful checks are kept.
        digests: Digests of the artifact and its adapters.
        cases: Prompts from `cases_of`.
        format: Key of `BOUNDS`.
        dtype: Type that the engine computes in.
        score: Plain forward that the engine is compared with.
    """

    def __init__(
        self,
        cache: Path,
        digests: Sequence[str],
        cases: list[Case],
        format: str,
        dtype: str,
        score: Score,
    ) -> None:
        self._folder, self._digests, self._cases = cache / "proofs", list(digests), cases
        self._format, self._dtype, self._score = format, dtype, score

    async def __call__(self, engine: Engine) -> None:
        """Compares an engine, unless the same engine passed on the same artifact before.

        Args:
            engine: Engine that is up.

        Raises:
            Unproven: The log-probabilities differ from the plain forward's, or there are none.
        """
        info, bound = engine.info, BOUNDS[self._format]
        if (known := self._file(info)).is_file():
            return
        if info.max_logprobs < 0:
            raise Unproven("returns no log-probabilities, so its scores cannot be checked")
        cases = [_fitting(case, info.max_context) for case in self._cases]
        # Both ways, since a batch may mix up sequences, and a lone sequence takes other kernels.
        together = await asyncio.gather(
            *(_ask(engine, f"proof-together-{i}", case) for i, case in enumerate(cases))
        )
        alone = [await _ask(engine, f"proof-alone-{i}", case) for i, case in enumerate(cases)]
        answers = {"in a batch": together, "alone": alone}
        pairs = [(way, *pair) for way in answers for pair in zip(cases, answers[way], strict=True)]
        try:
            scores = await self._score([_asked(case, answer) for _, case, answer in pairs])
        except EngineError as e:
            raise Unproven(f"cannot be compared with a plain forward, which fails: {e}") from e
        worst = 0.0
        for (way, case, answer), scored in zip(pairs, scores, strict=True):
            off = await self._distance(case, answer, scored, bound)
            if not off <= bound:  # NaN is not
                raise Unproven(_says(case, way, off, bound))
            worst = max(worst, off)
        _log.info("%s: log-probabilities within %.2g of a plain forward's", info.engine, worst)
        self._keep(known, info, worst)

    async def _distance(self, case: Case, answer: _Answer, scored: Scores, bound: float) -> float:
        """Returns the distance from the plain forward, or from one with ties decided otherwise.

        Ties are turned one by one; those that reduce the distance stay turned.
        """
        off, turned = _distance(answer, scored), tuple[Tie, ...]()
        for tie in scored.ties[:_MOST_TIES]:
            if off <= bound:
                break
            asked = _asked(case, answer)._replace(turned=(*turned, tie))
            [other] = await self._score([asked])
            if (other_off := _distance(answer, other)) < off:
                off, turned = other_off, asked.turned
        if turned and off <= bound:
            told = "a prompt of %d tokens: %d choices of experts differ because of rounding"
            _log.info(told, len(case.prompt), len(turned))
        return off

    def _file(self, info: EngineInfo) -> Path:
        # Everything that the result depends on is in the name: a new version checks again.
        engine = [info.engine, info.built_with, self._dtype, self._format]
        asked = [(len(case.prompt), case.adapter) for case in self._cases]
        text = json.dumps([_VERSION, BOUNDS, self._digests, engine, asked], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def _keep(self, path: Path, info: EngineInfo, worst: float) -> None:
        about = {"of": self._digests, "engine": info.engine, "built_with": info.built_with}
        text = json.dumps({**about, "dtype": self._dtype, "worst_nats": worst}, indent=2)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, text + "\n")
        except OSError as e:
            fix = "name a folder that can be written"
            raise ConfigError("cache", path.parent, e.strerror or str(e), fix) from e


def _fitting(case: Case, max_context: int) -> Case:
    return Case(case.prompt[: max(1, max_context - _NEW_TOKENS)], case.adapter)


def cases_of(
    config: dict[str, Any], weight_bytes: int, has_gpu: bool, adapters: Iterable[str]
) -> list[Case]:
    """Returns prompts of several lengths, also beyond lengths at which the model changes.

    Args:
        config: Language model's part of `config.json`.
        weight_bytes: Bytes of the weight files, which bound the length of a prompt on a CPU.
        has_gpu: True: the engine runs on a GPU.
        adapters: Names of the adapters that are served.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    named = {**rope, **config}
    lengths = set(_LENGTHS)
    for key in _CHANGES_AT:
        if isinstance(at := named.get(key), int) and at > 0:
            lengths.add(at + _BEYOND)
    # These rescale the rotary frequencies by the length of the whole sequence.
    if rope.get("rope_type") in ("dynamic", "longrope"):
        lengths.add(int(config.get("max_position_embeddings", 0)) or max(_LENGTHS))
    # A forward takes a multiplication and an addition for each weight and token; with two bytes a
    # weight, that is one operation a byte and token.
    affordable = math.inf if has_gpu else max(max(_LENGTHS), _CPU_WORK / max(1, weight_bytes))
    chosen = sorted(length for length in lengths if length <= affordable)
    numbers = random.Random(0)
    # No prompt has padding tokens, since some models (RoBERTa) count no position for them.
    tokens = [i for i in range(int(config["vocab_size"])) if i != config.get("pad_token_id")]
    prompts = [numbers.choices(tokens, k=length) for length in chosen]
    cases = [Case(prompt) for prompt in prompts]
    return cases + [Case(prompt, name) for name in adapters for prompt in prompts[1:3]]


async def _ask(engine: Engine, name: str, case: Case) -> _Answer:
    info = engine.info
    request = TokenRequest(
        name,
        case.prompt,
        min(_NEW_TOKENS, info.max_context - len(case.prompt)),
        temperature=0,
        ignore_eos=True,
        logprobs=min(_ALTERNATIVES, info.max_logprobs),
        adapter=case.adapter,
    )
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    try:
        async for chunk in engine.submit(request):
            tokens += chunk.tokens
            logprobs += chunk.logprobs or []
    except EngineError as e:
        raise Unproven(f"fails at a prompt of {len(case.prompt)} tokens: {e}") from e
    if not len(logprobs) == len(tokens) == request.max_tokens:
        told = f"{len(tokens)} tokens and {len(logprobs)} log-probabilities"
        raise Unproven(f"returned {told} where {request.max_tokens} were asked for")
    return _Answer(tokens, logprobs)


def _asked(case: Case, answer: _Answer) -> Asked:
    of = [
        [token, *(other for other, _ in told.top)]
        for token, told in zip(answer.tokens, answer.logprobs, strict=True)
    ]
    return Asked(case.prompt + answer.tokens, len(case.prompt), of, case.adapter)


def _distance(answer: _Answer, scores: Scores) -> float:
    """Returns the root mean square difference of an engine's log-probabilities, in nats."""
    squares = []
    for told, best, of in zip(answer.logprobs, scores.best, scores.of, strict=True):
        found = [told.logprob, *(p for _, p in told.top)]
        squares += [(a - b) ** 2 for a, b in zip(found, of, strict=True)]
        # Decoding is greedy, so the engine's token must be the likeliest of the plain forward.
        squares.append((best - of[0]) ** 2)
    return math.sqrt(sum(squares) / len(squares))


def _says(case: Case, way: str, off: float, bound: float) -> str:
    adapter = "" if case.adapter is None else f" with adapter {case.adapter}"
    return (
        f"computes the model wrongly: after a prompt of {len(case.prompt)} tokens {way}"
        f"{adapter} its log-probabilities differ by {off:.2g} nats from a plain forward, above "
        f"the {bound:g} that rounding explains"
    )
