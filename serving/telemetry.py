"""What is written down of requests, as JSON lines, without their text unless that is asked for.

The log of requests maps a response's id to the artifact that made it. The drift file has what a
monitor compares over time: lengths, how often each bucket of token ids came, and how likely the
model found what it said.
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
from serving.text.stages import Chat, TextChunk

NUM_BUCKETS = 64  # of token ids: id modulo this


class DriftFeatures:
    """Of one request.

    Attributes:
        prompt_tokens: Of all prompts.
        completion_tokens: Of all choices.
        prompt_buckets: How many tokens of the prompts fall in each bucket.
        logprob_sum: Of the tokens that came with a log-probability.
        logprob_count: How many did.
    """

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0
        self.prompt_buckets = Counter(token % NUM_BUCKETS for prompt in prompts for token in prompt)
        self.logprob_sum, self.logprob_count = 0.0, 0

    def add(self, chunk: TextChunk) -> None:
        """What was generated."""
        self.completion_tokens += chunk.num_tokens
        for told in chunk.logprobs or ():
            self.logprob_sum += told.token.logprob
            self.logprob_count += 1


class Transcript:
    """What was said in one request.

    Attributes:
        prompts: As they came.
        completions: Of each choice, so far.
    """

    def __init__(self, prompts: Sequence[str | list[int] | Chat], num_choices: int) -> None:
        self.prompts = [
            dataclasses.asdict(prompt) if isinstance(prompt, Chat) else prompt for prompt in prompts
        ]
        self.completions = [""] * num_choices

    def add(self, index: int, chunk: TextChunk) -> None:
        """More of a choice."""
        self.completions[index] += chunk.text


class Telemetry:
    """Writes the two files.

    Args:
        config: Which, and of how many requests.

    Raises:
        ConfigError: A file cannot be written.
    """

    def __init__(self, config: LogConfig) -> None:
        self._requests = _open("log.requests", config.requests)
        self._drift = _open("log.drift", config.drift)
        self._share, self._keeps_text = config.drift_share, config.text

    def sample(self, prompts: list[list[int]]) -> DriftFeatures | None:
        """Where a request's features go; None: it is not among those that are looked at."""
        if self._drift is None or random.random() >= self._share:
            return None
        return DriftFeatures(prompts)

    def transcript(
        self, prompts: Sequence[str | list[int] | Chat], num_choices: int
    ) -> Transcript | None:
        """Where a request's text goes; None: nobody asked for it."""
        return Transcript(prompts, num_choices) if self._keeps_text else None

    def request(self, transcript: Transcript | None, **fields: Any) -> None:
        """A line for a request that has ended."""
        if transcript is not None:
            fields |= vars(transcript)
        if self._requests is not None:
            _write(self._requests, fields)

    def drift(self, id: str, artifact: str, features: DriftFeatures) -> None:
        """A line for a sampled request that ended well."""
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
        # It says who asked when, and with log.text what: nobody else's to read.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return open(descriptor, "a", encoding="utf-8", buffering=1)
    except OSError as e:
        raise ConfigError(key, name, e.strerror or str(e), "name a file that can be written") from e


def _write(file: IO[str], fields: dict[str, Any]) -> None:
    file.write(json.dumps({"time": round(time.time(), 3), **fields}) + "\n")
