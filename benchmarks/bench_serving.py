"""Measures CPU time per token and latency at 1, 8 and 32 streams, with peers in the same run.

    python -m benchmarks.bench_serving [--streams 1 8 32] [--rounds 3]

The model is a random Llama of 40M parameters; each stream sends one request after another, with
prompts and answers of 64 tokens. Servers are compared by the CPU time of their whole process tree
per token, since wall-clock times vary on a shared machine. OpenVINO is included if
SPOTFORGE_OPENVINO_PYTHON names an environment, llama.cpp if SPOTFORGE_LLAMA_PYTHON does
(`make test-openvino`, `make test-llama`), LitServe if it is installed. Prints a table and writes
`benchmarks/results/serving.json`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compression.targets.openvino_program import PYTHON
from core.process.python import environment, python
from core.settings.options import OptionParser
from monitoring.environment import describe_environment
from trainer.data.tokenizer import train_tokenizer

RESULT = Path("benchmarks/results/serving.json")
PROMPT_TOKENS = NEW_TOKENS = 64
LLAMA_PYTHON = "SPOTFORGE_LLAMA_PYTHON"
_VOCAB_SIZE = 8192


def save_model(folder: Path) -> None:
    """Saves a random Llama of 40M parameters with a tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=_VOCAB_SIZE,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,  # not every peer can be told to continue after it
        pad_token_id=None,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(20_000)]
    tokenizer = train_tokenizer([" ".join(words)] * 3, _VOCAB_SIZE)
    tokenizer.save_pretrained(folder)
    # Tokens that are half a character would be sent together with the other half. Their embedding
    # is zeroed, so that they are not chosen and each token is one event.
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(_VOCAB_SIZE)]
    silent = [i for i, text in enumerate(texts) if not text or "\ufffd" in text]
    with torch.no_grad():
        model.get_input_embeddings().weight[silent] = 0.0
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Peer:
    """Describes how a server is started and asked.

    Attributes:
        command: Command, with `{port}` in place of the port.
        ready: Path that returns 200 once the server is up.
        model: Name of the model in requests.
        is_ours: True for a server of this project.
    """

    command: list[str]
    ready: str = "/readyz"
    model: str = "model"
    is_ours: bool = False


def servers(folder: Path, streams: int) -> dict[str, Peer]:
    """Returns all servers that this machine has, by name.

    Args:
        folder: Folder of the model.
        streams: Number of concurrent streams, for servers that must know it.
    """

    def ours(*words: str) -> Peer:
        command = python("-m", "serving", f"artifact={folder}", "port={port}")
        return Peer([*command, *words], is_ours=True)

    generate = python("-m", "benchmarks.peer_generate", str(folder), "{port}")
    program = "from transformers.cli.transformers import main; main()"
    transformers = [sys.executable, "-c", program, "serve", str(folder)]
    transformers += ["--continuous-batching", "--device", "cpu", "--port", "{port}"]
    found = {
        "FastAPI + generate behind a lock": Peer(generate),
        "transformers serve, continuous batching": Peer(transformers, "/health", str(folder)),
    }
    if importlib.util.find_spec("litserve") is not None:
        litserve = python("-m", "benchmarks.peer_litserve", str(folder), "{port}")
        found["LitServe, static batches of 8"] = Peer(litserve, "/health")
    if llama := os.environ.get(LLAMA_PYTHON):
        file = folder.with_name("gguf") / "gguf" / "model.gguf"
        program = str(Path(__file__).with_name("peer_llama.py"))
        command = [llama, program, str(file), "{port}", str(streams)]
        found["llama.cpp, Q8_0"] = Peer(command, "/health")
    # Memory for 5,000 tokens in each; 32 streams need 4,096.
    found["spotforge, transformers"] = ours("engine.name=transformers", "engine.kv_cache_mb=103")
    if os.environ.get(PYTHON):
        openvino = ["engine.name=openvino", "engine.kv_cache_mb=52"]
        found["spotforge, openvino int8"] = ours(*openvino)
        found["spotforge, openvino float32"] = ours(*openvino, "engine.openvino_bits=32")
    return found


def save_gguf(folder: Path) -> None:
    """Saves the model in Q8_0 for llama.cpp; the embedding, which is also the head, in float32."""
    text = folder.with_name("text.txt")
    draw = random.Random(1)
    text.write_text("\n".join(random_prompt(draw) for _ in range(4_000)))
    command = python("-m", "compression", f"model={folder}", "recipe=int8_weight_only")
    command += ["recipe.int8_weight_only.group_size=32", "target=gguf", "data=text"]
    command += [f"data.path={text}", "data.max_seq_len=64", "data.validation_fraction=0.3"]
    command += ["evaluation.num_samples=2"]
    command += [f"out={folder.with_name('gguf')}"]
    subprocess.run(command, check=True, capture_output=True, env=environment())


class Server:
    """Runs a server and measures its process tree."""

    def __init__(self, name: str, peer: Peer, cache: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.is_ours = peer.model, peer.is_ours
        # The port is free again now. Another process may take it, which then shows as a failed
        # start.
        self._began_s = time.monotonic()
        self._process = subprocess.Popen(
            [word.replace("{port}", str(self.port)) for word in peer.command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(SPOTFORGE_CACHE=str(cache), HF_HUB_OFFLINE="1"),
        )
        url = f"http://127.0.0.1:{self.port}{peer.ready}"
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"{name} did not start")
            try:
                if httpx.get(url).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        self.start_s = time.monotonic() - self._began_s

    def tree(self) -> list[psutil.Process]:
        """Returns all processes of the server."""
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def cpu_s(self) -> list[float]:
        """Returns user plus system time of each process, in seconds."""
        return [sum(process.cpu_times()[:2]) for process in self.tree()]

    def rss_bytes(self) -> int:
        """Returns the resident memory of all processes, in bytes."""
        return sum(process.memory_info().rss for process in self.tree())

    def stop(self) -> None:
        """Stops the server and all of its processes."""
        tree = self.tree()
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        # The tree was read before the end: orphans have no parent to be found by.
        for process in psutil.wait_procs(tree, 5)[1]:  # workers that some peers leave behind
            process.kill()


def random_prompt(draw: random.Random) -> str:
    """Returns a prompt of `PROMPT_TOKENS` tokens: a space and a letter are always one token."""
    return "".join(f" {draw.choice('abcdefghijklmnop')}" for _ in range(PROMPT_TOKENS))


async def load(port: int, model: str, streams: int, rounds: int) -> dict[str, list[float]]:
    """Sends requests; returns times to the first token and between events, in seconds."""
    first: list[float] = []
    between: list[float] = []

    async def stream(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(rounds):
            fields = {"model": model, "prompt": random_prompt(draw), "max_tokens": NEW_TOKENS}
            body = json.dumps(fields | {"temperature": 0, "stream": True}).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            last_s, count = time.monotonic(), 0
            status = await reader.readline()
            assert b" 200 " in status, status
            async for line in reader:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    break
                now_s = time.monotonic()
                (between if count else first).append(now_s - last_s)
                last_s, count = now_s, count + 1
            writer.close()

    await asyncio.gather(*(stream(i) for i in range(streams)))
    return {"first": first, "between": between}


def measure(server: Server, streams: int, rounds: int) -> dict[str, float | None]:
    """Measures one row; which process of a peer is its gateway is not known."""
    asyncio.run(load(server.port, server.model, min(streams, 2), 1))  # warms up
    cpu_before, began_s = server.cpu_s(), time.monotonic()
    times = asyncio.run(load(server.port, server.model, streams, rounds))
    took_s, cpu_after = time.monotonic() - began_s, server.cpu_s()
    tokens = streams * rounds * NEW_TOKENS
    between = sorted(times["between"])
    gateway_ms = round(1000 * (cpu_after[0] - cpu_before[0]) / tokens, 3)
    return {
        "cpu_ms_per_token": round(1000 * (sum(cpu_after) - sum(cpu_before)) / tokens, 3),
        "gateway_cpu_ms_per_token": gateway_ms if server.is_ours else None,
        "tokens_per_s": round(tokens / took_s, 1),
        "first_token_p50_ms": round(1000 * statistics.median(times["first"]), 1),
        "first_token_p99_ms": round(1000 * _p99(sorted(times["first"])), 1),
        "between_p50_ms": round(1000 * statistics.median(between), 1),
        "between_p99_ms": round(1000 * _p99(between), 1),
        "rss_mb": round(server.rss_bytes() / 1e6),
    }


def _p99(ordered: list[float]) -> float:
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def table(rows: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """Returns a Markdown table with a row per server and number of streams."""
    keys = list(next(iter(next(iter(rows.values())).values())))
    lines = [f"| server | streams | {' | '.join(keys)} |", "|---" * (len(keys) + 2) + "|"]
    for name, found in rows.items():
        for streams, row in found.items():
            figures = ("-" if value is None else f"{value:g}" for value in row.values())
            cells = [name, streams, *figures]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = OptionParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="requests per stream")
    options = parser.parse_args()
    rows: dict[str, dict[str, dict[str, float | None]]] = {}
    starts: dict[str, float] = {}
    result = {
        "environment": describe_environment(),
        "load_average": os.getloadavg(),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": options.rounds,
        "start_to_ready_s": starts,
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "model", Path(name) / "cache"
        save_model(folder)
        if os.environ.get(LLAMA_PYTHON):
            save_gguf(folder)
        peers = servers(folder, max(options.streams))
        if (int8 := "spotforge, openvino int8") in peers:
            smaller_steps = [*peers[int8].command, "engine.max_batch_tokens=36"]
            peers[f"{int8}, 36 tokens a step"] = replace(peers[int8], command=smaller_steps)
        for server_name, peer in peers.items():
            # The first start of our server also prepares files, which later starts reuse.
            if peer.is_ours:
                Server(server_name, peer, cache).stop()  # fills the caches before start_s counts
            server = Server(server_name, peer, cache)
            starts[server_name] = round(server.start_s, 2)
            try:
                for streams in options.streams:
                    row = measure(server, streams, options.rounds)
                    rows.setdefault(server_name, {})[str(streams)] = row
                    print(server_name, streams, row, flush=True)
            finally:
                server.stop()
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
