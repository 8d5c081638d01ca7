"""Hours of everything that clients do, at capacity, against a real server.

    python -m tests.serving.soak [--folder EXPORT] [--minutes 60] [--seed 0] [serving's settings]

Eight clients ask as fast as they are answered: completions and chats, whole and streamed, several
choices, stop strings, embeddings, requests that cannot be, and clients that leave in the middle.
At the end nothing may be lost and nothing may be left: every answer was whole, no request runs or
waits, the KV cache is empty, and the processes have the memory, the files and the threads that they
had after the first quarter.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from core.settings.options import OptionParser
from tests.serving.conftest import Process, save_model

CLIENTS = 8
MOST_GROWTH = 0.05  # of memory, from the second quarter to the last
_SETTLE_S = 3.0
_EMPTY_AT_THE_END = {
    "spotforge_num_requests_running",
    "spotforge_num_requests_waiting",
    "spotforge_kv_cache_usage_perc",
}
_NEVER = {"spotforge_engine_restarts", "spotforge_request_failed_total"}


@dataclass
class Usage:
    """Of all processes of a server, at one time."""

    rss_bytes: int
    files: int
    threads: int


@dataclass
class Outcome:
    """Of a soak.

    Attributes:
        counts: Requests by what they were.
        wrong: What was not as it has to be.
        usages: A sample every half second.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)

    def quarter(self, number: int, what: str) -> float:
        """Median of a quarter of the samples, from 0."""
        size = len(self.usages) // 4
        return statistics.median(
            getattr(usage, what) for usage in self.usages[number * size : (number + 1) * size]
        )

    @property
    def memory_growth(self) -> float:
        """Share, from the second quarter to the last."""
        return self.quarter(3, "rss_bytes") / self.quarter(1, "rss_bytes") - 1


def usage_of(pid: int) -> Usage:
    """Now."""
    parent = psutil.Process(pid)
    processes = [parent, *parent.children(recursive=True)]
    return Usage(
        sum(process.memory_info().rss for process in processes),
        sum(process.num_fds() for process in processes),
        sum(process.num_threads() for process in processes),
    )


async def soak(process: Process, seconds: float, seed: int) -> Outcome:
    """Asks for so long, then looks at what is left."""
    outcome = Outcome()
    end_s = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=2 * CLIENTS)
    async with httpx.AsyncClient(base_url=process.url, timeout=120, limits=limits) as client:
        sampler = asyncio.create_task(_sample(process, outcome))
        workers = [
            _ask(client, random.Random(f"{seed} {i}"), end_s, outcome) for i in range(CLIENTS)
        ]
        await asyncio.gather(*workers)
        sampler.cancel()
        await asyncio.sleep(_SETTLE_S)
        metrics = (await client.get("/metrics")).text
    for line in metrics.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in _EMPTY_AT_THE_END and float(line.split()[-1]) != 0:
            outcome.wrong.append(f"left at the end: {line}")
        if name in _NEVER and float(line.split()[-1]) != 0:
            outcome.wrong.append(f"it happened: {line}")
    if outcome.memory_growth > MOST_GROWTH:
        outcome.wrong.append(f"memory grew by {outcome.memory_growth:.1%}")
    for what in ("files", "threads"):
        before, after = outcome.quarter(1, what), outcome.quarter(3, what)
        if after > before + 2:
            outcome.wrong.append(f"{what}: {before:g} in the second quarter, {after:g} in the last")
    return outcome


async def _sample(process: Process, outcome: Outcome) -> None:
    while True:
        outcome.usages.append(usage_of(process.process.pid))
        await asyncio.sleep(0.5)


async def _ask(
    client: httpx.AsyncClient, draw: random.Random, end_s: float, outcome: Outcome
) -> None:
    kinds = [_whole, _whole, _stream, _stream, _stream, _chat, _leave, _embed, _refused]
    while time.monotonic() < end_s:
        kind = draw.choice(kinds)
        name = kind.__name__.removeprefix("_")
        try:
            what = await kind(client, draw)
        except (httpx.HTTPError, KeyError, IndexError) as e:
            what = f"{type(e).__name__}: {e}"
        outcome.counts[name] += 1
        if what is not None:
            outcome.wrong.append(f"{name}: {what}")


def _body(draw: random.Random, **fields: object) -> dict[str, object]:
    prompt = [draw.randrange(1, 256) for _ in range(draw.randint(1, 200))]
    most = draw.randint(1, 60)
    base = {"model": "tiny", "prompt": prompt, "max_tokens": most, "ignore_eos": True}
    return base | {"temperature": draw.choice([0, 0.7, 1]), "seed": draw.randrange(99)} | fields


async def _whole(client: httpx.AsyncClient, draw: random.Random) -> str | None:
    body = _body(draw, logprobs=draw.choice([None, 0, 3]))
    answer = await client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text[:200]}"
    found = answer.json()
    if found["usage"]["completion_tokens"] != body["max_tokens"]:
        return f"{found['usage']} of {body['max_tokens']}"
    return None if found["choices"][0]["finish_reason"] == "length" else str(found["choices"])


async def _stream(client: httpx.AsyncClient, draw: random.Random) -> str | None:
    body = _body(
        draw,
        stream=True,
        stream_options={"include_usage": True},
        stop=["a text that chance never writes"],
    )
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line async for line in answer.aiter_lines() if line]
    if answer.status_code != 200:
        return f"{answer.status_code} {lines[:1]}"
    if lines[-1] != "data: [DONE]" or f'"completion_tokens":{body["max_tokens"]}' not in lines[-2]:
        return f"ends with {lines[-2:]}"
    return None


async def _chat(client: httpx.AsyncClient, draw: random.Random) -> str | None:
    messages = [{"role": "user", "content": "cat " * draw.randint(1, 20)}]
    body = {"model": "tiny", "messages": messages, "max_tokens": draw.randint(1, 30)}
    answer = await client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text[:200]}"
    return None if answer.json()["choices"][0]["message"]["role"] == "assistant" else answer.text


async def _leave(client: httpx.AsyncClient, draw: random.Random) -> str | None:
    body = _body(draw, stream=True, max_tokens=200)
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return str(answer.status_code)
        left = draw.randint(0, 10)
        async for _ in answer.aiter_lines():
            left -= 1
            if left < 0:
                return None
    return None


async def _embed(client: httpx.AsyncClient, draw: random.Random) -> str | None:
    inputs = ["a cat"] * draw.randint(1, 3)
    answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": inputs})
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text[:200]}"
    return None if len(answer.json()["data"]) == len(inputs) else answer.text


async def _refused(client: httpx.AsyncClient, draw: random.Random) -> str | None:
    wrong = draw.choice([{"temperature": -1}, {"prompt": [10**6]}, {"max_tokens": 10**6}])
    answer = await client.post("/v1/completions", json=_body(draw, **wrong))
    return None if answer.status_code == 400 else f"{answer.status_code} in place of 400"


def main() -> None:
    """Entry point."""
    parser = OptionParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, help="of an artifact; a tiny random one if left out")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options, settings = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as work:
        folder = options.folder or Path(work) / "tiny"
        if options.folder is None:
            save_model(folder)
        process = start(folder, *settings)
        try:
            outcome = asyncio.run(soak(process, 60 * options.minutes, options.seed))
        finally:
            code = process.stop()
    print(f"{sum(outcome.counts.values())} requests: {dict(outcome.counts)}")
    print(f"memory: {outcome.quarter(1, 'rss_bytes') / 1e6:.0f} MB, {outcome.memory_growth:+.1%}")
    for wrong in outcome.wrong[:20]:
        print(wrong)
    print(f"{len(outcome.wrong)} wrong; exit code of the server {code}")
    raise SystemExit(bool(outcome.wrong or code))


def start(folder: Path, *settings: str) -> Process:
    """A server for as many as ask: an embedding or two choices never find it full."""
    return Process(folder, "model_name=tiny", f"engine.max_running={2 * CLIENTS}", *settings)


if __name__ == "__main__":
    main()
