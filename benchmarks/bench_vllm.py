"""Checks that vLLM computes what our compressed-tensors contain, by perplexity beside transformers.

    SPOTFORGE_VLLM_PYTHON=... python -m benchmarks.bench_vllm --model DIR --text FILE [FILE ...]

Models are the bfloat16 one, its W4A16 (GPTQ) and its W8A8 (SmoothQuant), on 8 texts of 200 tokens.
Prints a table and writes `benchmarks/results/vllm.json`. On a CPU `VLLM_CPU_INT4_W4A8=0` is set,
because otherwise vLLM rounds W4A16's inputs to int8 if the CPU has AMX.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.bench_compression import copy_text
from core.process.python import environment, python
from core.settings.options import OptionParser
from monitoring.environment import describe_environment
from serving.engines.vllm import PYTHON

RESULT = Path("benchmarks/results/vllm.json")
RECIPES = {
    "W4A16, GPTQ in groups of 64": ["recipe=int4_gptq", "recipe.int4_gptq.group_size=64"],
    "W8A8, SmoothQuant": ["recipe=w8a8_smoothquant"],
}
_NUM_TEXTS, _TOKENS, _EVERY = 8, 200, 3000  # _EVERY: tokens between the starts of two texts


def compress(model: Path, text: Path, words: list[str], out: Path) -> Path:
    """Compresses the model and returns the folder of the artifact."""
    command = python("-m", "compression", f"model={model}", *words)
    command += ["target=compressed_tensors", "data=text", f"data.path={text}"]
    command += ["data.max_seq_len=512", "data.validation_fraction=0.2", "evaluation.speed=false"]
    command += ["calibration.num_samples=32", "evaluation.num_samples=4", f"out={out}"]
    subprocess.run(command, check=True, env=environment())
    return out / "compressed_tensors"


@torch.no_grad()
def by_transformers(folder: Path, texts: list[list[int]]) -> list[float]:
    """Returns the log-probabilities of all tokens but the first of each text."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    found = []
    for ids in texts:
        logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        found += logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return found


def by_vllm(folder: Path, texts: list[list[int]], scratch: Path) -> tuple[list[float], str]:
    """Returns the same log-probabilities by vLLM, and vLLM's version."""
    asked, told = scratch / "texts.json", scratch / "told.json"
    asked.write_text(json.dumps(texts))
    program = str(Path(__file__).with_name("peer_vllm.py"))
    command = [os.environ[PYTHON], program, str(folder), str(asked), str(told)]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # The user's own settings come last and win.
    env = {"VLLM_CPU_INT4_W4A8": "0", **quiet, **os.environ}
    subprocess.run(command, check=True, env=env)
    found = json.loads(told.read_text())
    return [value for text in found["logprobs"] for value in text], found["version"]


def main() -> None:
    """Runs the command line."""
    parser = OptionParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files of text")
    options = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text[0].read_text(), add_special_tokens=False).input_ids
    texts = [ids[i * _EVERY : i * _EVERY + _TOKENS] for i in range(_NUM_TEXTS)]
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_text(options.text, folder)
        dense = folder / "dense"
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).save_pretrained(
            dense
        )
        tokenizer.save_pretrained(dense)
        artifacts = {"bfloat16": dense}
        for number, (row, words) in enumerate(RECIPES.items()):
            artifacts[row] = compress(options.model, folder / "text", words, folder / str(number))
        for row, artifact in artifacts.items():
            ours = by_transformers(artifact, texts)
            theirs, version = by_vllm(artifact, texts, folder)
            apart = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
            rows[row] = {
                "perplexity_transformers": round(_perplexity(ours), 3),
                "perplexity_vllm": round(_perplexity(theirs), 3),
                "mean_logprob_difference": round(apart, 4),
            }
            print(row, rows[row], flush=True)
    result = {
        "environment": describe_environment(),
        "vllm": version,
        "tokens": len(ours),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def _perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


if __name__ == "__main__":
    main()
