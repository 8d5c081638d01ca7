"""A peer of bench_serving: LitServe 0.2.19, with batches of eight that are closed when they start.

python -m benchmarks.peer_litserve MODEL PORT
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import litserve
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Serves `/v1/completions`, which reads `prompt` (text) and `max_tokens`."""

    def __init__(self, folder: str) -> None:
        super().__init__(
            max_batch_size=8, batch_timeout=0.02, api_path="/v1/completions", stream=True
        )
        self._folder = folder

    def setup(self, device: str) -> None:
        """Loads the model in the worker process."""
        self._model: Any = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32)
        self._model.eval()
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder, padding_side="left")
        # Padding is masked, so any token will do.
        self._tokenizer.pad_token_id = 0

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the request unchanged."""
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the requests as a list."""
        return inputs

    @torch.inference_mode()
    def predict(self, inputs: list[dict[str, Any]]) -> Iterator[list[str]]:
        """Yields one token of each request, greedily, until the longest request is done."""
        given = self._tokenizer(
            [request["prompt"] for request in inputs], padding=True, return_tensors="pt"
        )
        ids, mask, cache = given["input_ids"], given["attention_mask"], None
        for _ in range(max(request["max_tokens"] for request in inputs)):
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            out = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            yield self._tokenizer.batch_decode(ids)

    def encode_response(self, output: Iterator[list[str]]) -> Any:  # FastAPI reads the return type
        """Yields server-sent events."""
        for texts in output:
            yield [f"data: {json.dumps({'choices': [{'text': text}]})}\n\n" for text in texts]


if __name__ == "__main__":
    server = litserve.LitServer(Api(sys.argv[1]), accelerator="cpu", devices=1, timeout=600)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning"
    )
