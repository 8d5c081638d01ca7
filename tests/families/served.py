"""The column of serving: what a server answers, beside `generate` of stock transformers."""

import asyncio
import os
import signal
from typing import Any

import httpx
import torch
from transformers import AutoTokenizer

from tests.families.places import Places
from tests.families.training import stock
from tests.families.workers import Wrong
from tests.ports import free_port

TOLERANCE = 1e-4  # of a log-probability
_NEW_TOKENS = 16
# Of several lengths, two of them beyond the windows of the zoo; asked for at once, and alone.
_PROMPTS = (
    "The quick brown fox jumps over a lazy dog",
    "a",
    "naïve café",
    "row 7 green cloud seven walk under paper river stone lamp",
)


def judge(places: Places, column: str) -> str:
    """Serves the model, asks for all prompts at once and for one alone, and compares.

    Args:
        places: Of the family.
        column: There is only one.

    Returns:
        The engine that answered, where it is not transformers' own batching.
    """
    wanted = [_generated(places, prompt) for prompt in _PROMPTS]
    engine, answers = asyncio.run(_asked(places))
    for prompt, answer in zip((*_PROMPTS, _PROMPTS[0]), answers, strict=True):
        text, logprobs = wanted[_PROMPTS.index(prompt)]
        found = answer["logprobs"]["token_logprobs"]
        if len(found) != len(logprobs):
            raise Wrong(f"{prompt!r}: {len(found)} tokens, by generate {len(logprobs)}")
        worst = max((abs(a - b) for a, b in zip(found, logprobs, strict=True)), default=0.0)
        if not worst <= TOLERANCE:
            raise Wrong(f"{prompt!r}: log-probabilities differ by {worst:.1e}")
        if answer["text"] != text:
            raise Wrong(f"{prompt!r}: the text is {answer['text']!r}, by generate {text!r}")
    return engine


def _generated(places: Places, prompt: str) -> tuple[str, list[float]]:
    """What follows a prompt: its text, and the log-probabilities of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(places.model)
    model = stock(places)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        all_ids = model.generate(ids, do_sample=False, max_new_tokens=_NEW_TOKENS)
        logits = model(input_ids=all_ids, use_cache=False).logits[0]
    new = all_ids[0, ids.shape[1] :].tolist()
    if new[-1] == model.generation_config.eos_token_id:
        new = new[:-1]
    logprobs = logits[ids.shape[1] - 1 :].log_softmax(-1)
    begun = tokenizer.decode(ids[0], skip_special_tokens=True)
    text = tokenizer.decode([*ids[0].tolist(), *new], skip_special_tokens=True)
    return text[len(begun) :], [float(logprobs[i, token]) for i, token in enumerate(new)]


async def _asked(places: Places) -> tuple[str, list[dict[str, Any]]]:
    """The engine's name, and the answers to all prompts at once and to the first one alone."""
    from serving.config import AdmissionConfig, EngineConfig, ServingConfig
    from serving.server import serve

    port = free_port()
    config = ServingConfig(
        artifact=str(places.model),
        port=port,
        cache=str(places.root / "serving-cache"),
        engine=EngineConfig(num_threads=1, max_running=8),
        # All wait for an engine that works on one at a time.
        admission=AdmissionConfig(max_queued_requests=len(_PROMPTS)),
    )
    serving = asyncio.create_task(serve(config))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            await _ready(client, serving)
            together = await asyncio.gather(*(_ask(client, prompt) for prompt in _PROMPTS))
            alone = await _ask(client, _PROMPTS[0])
            models = (await client.get("/version")).json()["models"]
    finally:
        if not serving.done():
            os.kill(os.getpid(), signal.SIGTERM)  # as an operator stops it
        await serving
    [engine] = (model["engine"] for model in models.values())
    return "" if engine.startswith("transformers ") else f"by {engine}", [*together, alone]


async def _ready(client: httpx.AsyncClient, serving: asyncio.Task[None]) -> None:
    """Waits until /readyz says so; raises what the server ended with."""
    while not serving.done():
        try:
            response = await client.get("/readyz")
            if response.status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        await asyncio.sleep(0.2)
    serving.result()


async def _ask(client: httpx.AsyncClient, prompt: str) -> dict[str, Any]:
    models = (await client.get("/v1/models")).json()["data"]
    body = {
        "model": models[0]["id"],
        "prompt": prompt,
        "max_tokens": _NEW_TOKENS,
        "temperature": 0,
        "logprobs": 1,
    }
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise Wrong(f"{prompt!r}: {response.status_code} {response.text[:200]}")
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice
