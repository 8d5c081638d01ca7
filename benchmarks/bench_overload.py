"""Measures a server that gets four times as many requests as it can answer: refusals and delays.

    python -m benchmarks.bench_overload [--seconds 20] [--running 8]

Model and requests are those of bench_serving. First there are as many streams as run at once, each
with one request after another: this measures the server's capacity, and nobody waits. Then requests
arrive at random times, whether or not earlier ones are answered: at that rate, then at four times
the rate. This is done with the server's default queue and without a queue. Prints a line for each
and writes `benchmarks/results/overload.json`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.bench_serving import NEW_TOKENS, Server, random_prompt, save_model, servers
from core.settings.options import OptionParser
from monitoring.environment import describe_environment

RESULT = Path("benchmarks/results/overload.json")
TIMES = 4
# With a queue a request may wait for up to the time of an answer; without, it is refused at once.
QUEUES = {"with its queue": [], "no queue": ["admission.max_queued_requests=0"]}
_REFUSAL_S = 0.05  # the goal for the time to a refusal


@dataclass
class Seen:
    """Collects what clients observe; times are in seconds."""

    first: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    whole: int = 0
    wrong: list[str] = field(default_factory=list)


async def ask(port: int, draw: random.Random, seen: Seen) -> None:
    """Sends one streamed request on a connection of its own, and records the outcome."""
    fields = {"model": "model", "prompt": random_prompt(draw), "max_tokens": NEW_TOKENS}
    body = json.dumps(fields | {"temperature": 0, "stream": True}).encode()
    began_s = time.monotonic()
    # A plain socket: the pool of a client library would hold requests back by itself.
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    status = int((await reader.readline()).split()[1])
    if status == 429:
        seen.refused.append(time.monotonic() - began_s)
        rest = (await reader.read()).lower()
        if b"retry-after:" not in rest:
            seen.wrong.append("a 429 without Retry-After")
    elif status == 200:
        is_first, is_whole = True, False
        async for line in reader:
            if line.startswith(b"data: ") and is_first:
                seen.first.append(time.monotonic() - began_s)
                is_first = False
            is_whole = is_whole or line.startswith(b"data: [DONE]")
        seen.whole += is_whole
        if not is_whole:
            seen.wrong.append("an answer that was cut off")
    else:
        seen.wrong.append(f"status {status}")
    writer.close()


async def at_capacity(port: int, streams: int, seconds: float) -> tuple[Seen, float]:
    """Returns what clients observed, and the requests per second."""
    seen, began_s = Seen(), time.monotonic()

    async def stream(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < began_s + seconds:
            await ask(port, draw, seen)

    await asyncio.gather(*(stream(i) for i in range(streams)))
    return seen, seen.whole / (time.monotonic() - began_s)


async def arriving(port: int, rate: float, seconds: float) -> Seen:
    """Sends requests at random times, `rate` a second; returns what clients observed."""
    seen, draw = Seen(), random.Random(0)
    tasks = []
    at_s = time.monotonic()
    end_s = at_s + seconds
    while at_s < end_s:
        # Exponential gaps make a Poisson process: arrivals that are independent of each other.
        at_s += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        tasks.append(asyncio.create_task(ask(port, draw, seen)))
    await asyncio.gather(*tasks)
    return seen


def measure(server: Server, running: int, seconds: float) -> dict[str, Any]:
    """Measures one row of the result."""
    asyncio.run(at_capacity(server.port, running, 2))  # warms up
    capacity, rate = asyncio.run(at_capacity(server.port, running, seconds))
    at_rate = asyncio.run(arriving(server.port, rate, seconds))
    # After the normal rate, so that the growth is what the excess requests add.
    before_bytes = server.rss_bytes()
    over = asyncio.run(arriving(server.port, TIMES * rate, seconds))
    after_bytes = server.rss_bytes()
    # A server that answers wrongly may well be fast, so none of its figures count.
    if wrong := capacity.wrong + at_rate.wrong + over.wrong:
        raise RuntimeError(f"{len(wrong)} wrong answers, as: {wrong[0]}")
    in_time = sum(s <= _REFUSAL_S for s in over.refused) / len(over.refused)
    streams_s, at_rate_s, over_s = (_quantile(s.first, 0.99) for s in (capacity, at_rate, over))
    return {
        "capacity_requests_per_s": round(rate, 2),
        "refused_at_that_rate": round(
            len(at_rate.refused) / (len(at_rate.refused) + at_rate.whole), 4
        ),
        "offered": len(over.refused) + over.whole,
        "answered": over.whole,
        "refused": len(over.refused),
        "refused_within_50_ms": round(in_time, 4),
        "refusal_p50_ms": round(1000 * _quantile(over.refused, 0.5), 1),
        "refusal_p99_ms": round(1000 * _quantile(over.refused, 0.99), 1),
        "first_token_p99_ms_of_streams": round(1000 * streams_s, 1),
        "first_token_p99_ms_at_that_rate": round(1000 * at_rate_s, 1),
        "first_token_p99_ms": round(1000 * over_s, 1),
        "first_token_p99_to_streams": round(over_s / streams_s, 2),
        "first_token_p99_to_that_rate": round(over_s / at_rate_s, 2),
        "rss_mb": round(after_bytes / 1e6),
        "rss_growth": round(after_bytes / before_bytes - 1, 4),
    }


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Runs the command line."""
    parser = OptionParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="length of each of three parts")
    parser.add_argument("--running", type=int, default=8, help="engine.max_running")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    result = {
        "environment": describe_environment(),
        "load_average": os.getloadavg(),
        "times_capacity": TIMES,
        "max_running": options.running,
        "seconds": options.seconds,
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "model", Path(name) / "cache"
        save_model(folder)
        for server_name, peer in servers(folder, options.running).items():
            if not peer.is_ours:
                continue
            for queue, setting in QUEUES.items():
                words = [*peer.command, f"engine.max_running={options.running}", *setting]
                server = Server(server_name, replace(peer, command=words), cache)
                row = f"{server_name}, {queue}"
                try:
                    rows[row] = measure(server, options.running, options.seconds)
                finally:
                    server.stop()
                print(row, json.dumps(rows[row]), flush=True)
                RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
