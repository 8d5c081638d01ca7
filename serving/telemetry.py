"""Logs of requests as JSON lines, without their text unless `log.text` is set.

The log of requests maps a response's id to the artifact that made it. The drift file has what a
monitor compares over time: lengths, counts of token ids by bucket, and mean log-probabilities.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from core.errors import ConfigError
from serving.config import LogConfig
from serving.text.codec import Chat, TextChunk

NUM_BUCKETS = 64  # the bucket of a token id is the id modulo this


class DriftFeatures:
    """Features of one request for the drift file.

    Attributes:
        prompt_tokens: Tokens of all prompts.
        completion_tokens: Tokens of all choices.
        prompt_buckets: Number of prompt tokens in each bucket.
        logprob_sum: Sum of the log-probabilities of generated tokens, where they are known.
        logprob_count: Number of tokens in that sum.
    """

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0
        self.prompt_buckets = Counter(token % NUM_BUCKETS for prompt in prompts for token in prompt)
        self.logprob_sum, self.logprob_count = 0.0, 0

    def add(self, chunk: TextChunk) -> None:
        """Adds a chunk of generated tokens."""
        self.completion_tokens += chunk.num_tokens
        for told in chunk.logprobs or ():
            self.logprob_sum += told.token.logprob
            self.logprob_count += 1


class Transcript:
    """Text of one request.

    Attributes:
        prompts: Prompts as the client sent them.
        completions: Text of each choice so far.
    """

    def __init__(self, prompts: Sequence[str | list[int] | Chat], num_choices: int) -> None:
        self.prompts = [
            dataclasses.asdict(prompt) if isinstance(prompt, Chat) else prompt for prompt in prompts
        ]
        self.completions = [""] * num_choices

    def add(self, index: int, chunk: TextChunk) -> None:
        """Appends a chunk to the text of a choice."""
        self.completions[index] += chunk.text


class Telemetry:
    """Writer of the log of requests and the drift file.

    Args:
        config: Settings: which files, and the share of sampled requests.

    Raises:
        ConfigError: A file cannot be written.
    """

    def __init__(self, config: LogConfig) -> None:
        self._requests = _open("log.requests", config.requests)
        self._drift = _open("log.drift", config.drift)
        self._share, self._keeps_text = config.drift_share, config.text

    def sample(self, prompts: list[list[int]]) -> DriftFeatures | None:
        """Returns an object that collects a request's features; None: it is not sampled."""
        if self._drift is None or random.random() >= self._share:
            return None
        return DriftFeatures(prompts)

    def transcript(
        self, prompts: Sequence[str | list[int] | Chat], num_choices: int
    ) -> Transcript | None:
        """Returns an object that collects a request's text; None: text is not logged."""
        return Transcript(prompts, num_choices) if self._keeps_text else None

    def request(self, transcript: Transcript | None, **fields: Any) -> None:
        """Writes a line for a request that has ended."""
        if transcript is not None:
            fields |= vars(transcript)
        if self._requests is not None:
            _write(self._requests, fields)

    def drift(self, id: str, artifact: str, features: DriftFeatures) -> None:
        """Writes a line for a sampled request that ended well."""
        if self._drift is None:
            return
        count = features.logprob_count
        _write(
            self._drift,
            {
                "id": id,
                "artifact": artifact,
                "prompt_tokens": features.prompt_tokens,
                "completion_tokens": features.completion_tokens,
                "prompt_buckets": [features.prompt_buckets[i] for i in range(NUM_BUCKETS)],
                "mean_logprob": round(features.logprob_sum / count, 6) if count else None,
            },
        )


def _open(key: str, name: str | None) -> IO[str] | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Readable by the owner only: it says who asked when, and with log.text what.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return open(descriptor, "a", encoding="utf-8", buffering=1)
    except OSError as e:
        raise ConfigError(key, name, e.strerror or str(e), "name a file that can be written") from e


def _write(file: IO[str], fields: dict[str, Any]) -> None:
    file.write(json.dumps({"time": round(time.time(), 3), **fields}) + "\n")
