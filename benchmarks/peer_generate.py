"""A peer of bench_serving: FastAPI with `generate` behind a lock, as in tutorials.

python -m benchmarks.peer_generate MODEL PORT
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from threading import Thread
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


def make_app(folder: str) -> FastAPI:
    """Returns an app with `/v1/completions`, which reads `prompt` (text) and `max_tokens`."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    app, lock = FastAPI(), asyncio.Lock()

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()

        async def events() -> AsyncIterator[str]:
            # One request at a time: `generate` has no queue of its own.
            async with lock:
                streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
                ids = tokenizer(body["prompt"], return_tensors="pt")["input_ids"]
                size = body["max_tokens"]
                # Exactly as many tokens as requested, so that all servers do the same work.
                settings: dict[str, Any] = dict(
                    min_new_tokens=size, max_new_tokens=size, do_sample=False
                )
                settings["streamer"] = streamer
                work = Thread(target=model.generate, args=(ids,), kwargs=settings)
                work.start()
                pieces: Iterator[str] = iter(streamer)
                while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                    yield f"data: {json.dumps({'choices': [{'text': piece}]})}\n\n"
                work.join()
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/readyz")
    async def readyz() -> str:
        return "ok"

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1]), port=int(sys.argv[2]), log_level="warning")
