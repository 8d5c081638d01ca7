"""Plain forwards of the same weights that engines are compared with."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compression.targets.openvino_program import OpenVino
from core.errors import SpotforgeError
from serving.engine import EngineError
from serving.engines.process import ProcessEngine
from serving.engines.proof import Asked, Score, Scores


def of_program(engine: ProcessEngine) -> Score:
    """Returns a plain forward that runs in the engine's own process, with its loaded weights."""
    numbers = itertools.count()

    async def score(asked: list[Asked]) -> list[Scores]:
        scored = []
        for one in asked:
            rows, ties = await engine.score(f"score-{next(numbers)}", *one)
            scored.append(Scores([row[0] for row in rows], [row[1:] for row in rows], ties))
        return scored

    return score


def of_ir(ir: Path) -> Score:
    """Returns a plain forward by OpenVINO without GenAI.

    Args:
        ir: Folder of the IR that the engine runs.
    """
    return _of_logits(lambda tokens: OpenVino().logits(ir, tokens))


def of_another(engine: ProcessEngine) -> Score:
    """Returns a plain forward by another engine, which runs only while it scores.

    Args:
        engine: Engine with the same files that is not started.
    """
    by_engine = of_program(engine)

    async def score(asked: list[Asked]) -> list[Scores]:
        try:
            await engine.start()
            return await by_engine(asked)
        except SpotforgeError as e:
            raise EngineError(str(e)) from e
        finally:
            await engine.close()

    return score


def _of_logits(logits: Callable[[NDArray[np.int64]], NDArray[Any]]) -> Score:
    async def score(asked: list[Asked]) -> list[Scores]:
        # Rows are padded to one length: in a causal model, later tokens do not affect earlier ones.
        tokens = np.zeros((len(asked), max(len(one.tokens) for one in asked)), np.int64)
        for row, one in zip(tokens, asked, strict=True):
            row[: len(one.tokens)] = one.tokens
        try:
            found = await asyncio.to_thread(logits, tokens)  # (N, T, V)
        except SpotforgeError as e:
            raise EngineError(str(e)) from e
        return [_scores(row, one) for row, one in zip(found, asked, strict=True)]

    return score


def _scores(logits: NDArray[Any], asked: Asked) -> Scores:
    """Returns the scores of a sequence from its logits (T, V)."""
    # The logits at a position predict the next token, hence the shift by one.
    places = logits[asked.start - 1 : len(asked.tokens) - 1].astype(np.float64)
    places -= places.max(-1, keepdims=True)
    places -= np.log(np.exp(places).sum(-1, keepdims=True))
    best = places.max(-1).tolist()
    return Scores(best, [row[of].tolist() for row, of in zip(places, asked.of, strict=True)])
