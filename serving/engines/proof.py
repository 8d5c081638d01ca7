"""The proof that an engine computes what the model does: numbers, before anybody is told "ready".

An engine that answers may still leave out what makes a model that model: a cap on attention, a
position's bias, a window. So it generates greedily after a few prompts of several lengths, all in
one batch and each alone, and its log-probabilities are compared with those of a plain forward:
eager attention, whole sequences, no cache of pages.
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

# Nats, root mean square over the tokens of one prompt. Rounding leaves less, and what is left out
# more: a wrong model is off by tenths at the least. What is stored in fewer bits is computed
# from the same codes on both sides; only an engine that rounds the inputs of its products, too, as
# OpenVINO and vLLM do for int8 and less, needs the wider rows.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.08, "float16": 0.03, "int8": 0.5, "int4": 0.5}

_LENGTHS = (1, 6, 40, 130)  # of prompts: within a page of the cache, and over several
_NEW_TOKENS = 6
_ALTERNATIVES = 4
_BEYOND = 24  # tokens behind a length at which a model changes what it does
_CHANGES_AT = (
    "sliding_window",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
    "original_max_position_embeddings",
)
_CPU_WORK = 3e12  # operations of a forward, about a minute on a few cores; longer prompts are cut
_MOST_TIES = 16  # that are turned, of one sequence; each takes a forward
_VERSION = 1  # of what is asked and compared


class Asked(NamedTuple):
    """A sequence that a plain forward is to score.

    Attributes:
        tokens: All of it.
        start: Index of the first new token.
        of: Token ids, for each new one.
        adapter: That is added to the model; None: the model alone.
        turned: Ties in which the other one is to be taken.
    """

    tokens: list[int]
    start: int
    of: list[list[int]]
    adapter: str | None
    turned: tuple[Tie, ...] = ()


class Scores(NamedTuple):
    """Log-probabilities that a plain forward gives, in the place of each new token.

    Attributes:
        best: Of the likeliest token.
        of: Of the tokens that were asked about.
        ties: That there were, the nearest first.
    """

    best: list[float]
    of: list[list[float]]
    ties: tuple[Tie, ...] = ()


# Raises EngineError where the plain forward fails.
Score = Callable[[list[Asked]], Awaitable[list[Scores]]]


@dataclass(frozen=True)
class Case:
    """A prompt, and the adapter that it is for."""

    prompt: list[int]
    adapter: str | None = None


@dataclass(frozen=True)
class _Answer:
    """What an engine said after a prompt."""

    tokens: list[int]
    logprobs: list[TokenLogprob]


class Proof:
    """Of one artifact, with its adapters, by one kind of engine.

    Args:
        cache: Folder in which proofs are kept that were successful.
        digests: Of the artifact and of its adapters.
        cases: From `cases_of`.
        format: Key of `BOUNDS`.
        dtype: That the engine computes in.
        score: The plain forward.
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
        """Compares, unless the same engine was proven on the same artifact before.

        Args:
            engine: That takes requests.

        Raises:
            Unproven: The numbers are not those of the plain forward, or there are none.
        """
        info, bound = engine.info, BOUNDS[self._format]
        if (known := self._file(info)).is_file():
            return
        if info.max_logprobs < 0:
            raise Unproven("tells no log-probabilities, so that nothing is proven")
        cases = [_fitting(case, info.max_context) for case in self._cases]
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
        """From the plain forward, or from one that differs where rounding decides.

        Ties are turned one by one, and those that bring it nearer stay turned.
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
            told = "a prompt of %d tokens: choices of experts that rounding decides are others: %d"
            _log.info(told, len(case.prompt), len(turned))
        return off

    def _file(self, info: EngineInfo) -> Path:
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
    """Prompts of several lengths, and beyond each length at which the model changes what it does.

    Args:
        config: What `config.json` says of the language model.
        weight_bytes: Of its files, which say how long a prompt is affordable.
        has_gpu: Whether the engine has one.
        adapters: Names of those that are served with it.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    named = {**rope, **config}
    lengths = set(_LENGTHS)
    for key in _CHANGES_AT:
        if isinstance(at := named.get(key), int) and at > 0:
            lengths.add(at + _BEYOND)
    if rope.get("rope_type") in ("dynamic", "longrope"):  # by the length of the whole sequence
        lengths.add(int(config.get("max_position_embeddings", 0)) or max(_LENGTHS))
    # An operation for each weight and token, and one more to add up; two bytes a weight.
    affordable = math.inf if has_gpu else max(max(_LENGTHS), _CPU_WORK / max(1, weight_bytes))
    chosen = sorted(length for length in lengths if length <= affordable)
    numbers = random.Random(0)
    # No prompt holds padding, which some models (RoBERTa) count no position for.
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
        raise Unproven(f"told {told} where {request.max_tokens} were asked for")
    return _Answer(tokens, logprobs)


def _asked(case: Case, answer: _Answer) -> Asked:
    of = [
        [token, *(other for other, _ in told.top)]
        for token, told in zip(answer.tokens, answer.logprobs, strict=True)
    ]
    return Asked(case.prompt + answer.tokens, len(case.prompt), of, case.adapter)


def _distance(answer: _Answer, scores: Scores) -> float:
    """Root mean square difference of an engine's log-probabilities, in nats."""
    squares = []
    for told, best, of in zip(answer.logprobs, scores.best, scores.of, strict=True):
        found = [told.logprob, *(p for _, p in told.top)]
        squares += [(a - b) ** 2 for a, b in zip(found, of, strict=True)]
        squares.append((best - of[0]) ** 2)  # greedy: the token that is taken is the likeliest
    return math.sqrt(sum(squares) / len(squares))


def _says(case: Case, way: str, off: float, bound: float) -> str:
    adapter = "" if case.adapter is None else f" with adapter {case.adapter}"
    return (
        f"computes it wrongly: after a prompt of {len(case.prompt)} tokens {way}"
        f"{adapter} its log-probabilities are {off:.2g} from those of a plain forward, where "
        f"{bound:g} may be rounding"
    )
