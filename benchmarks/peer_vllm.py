"""The vLLM side of bench_vllm: log-probabilities of texts, in an environment that has only vLLM.

python benchmarks/peer_vllm.py FOLDER TEXTS.json OUT.json

Reads lists of token ids, and writes vLLM's version and, for each list, the log-probabilities of all
tokens but the first.
"""

import json
import os
import sys
from pathlib import Path

import vllm


def main(folder: str, texts: str, out: str) -> None:
    """Loads the model with vLLM's defaults and asks for the log-probabilities."""
    token_ids = json.loads(Path(texts).read_text())
    longest = max(map(len, token_ids)) + 1
    model = vllm.LLM(folder, enforce_eager=True, max_model_len=longest, max_num_seqs=8)
    asked = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": ids} for ids in token_ids]
    found = []
    answers = model.generate(prompts, asked, use_tqdm=False)
    for ids, answer in zip(token_ids, answers, strict=True):
        told = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
        found.append([of_token[token].logprob for token, of_token in told])
    Path(out).write_text(json.dumps({"version": vllm.__version__, "logprobs": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # a thread of vLLM's CPU backend aborts a normal exit
