"""Runs a GGUF file in llama.cpp: `python llama_cpp.py FILE < requests.json > answers.json`.

In an environment of its own, with xllamacpp alone. A request is an endpoint of its server and what
is posted there.
"""

import json
import os
import sys
import urllib.request

import xllamacpp


def main(path):
    requests = json.load(sys.stdin)
    answers_to = os.dup(1)
    os.dup2(2, 1)  # it logs to stdout
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.port = 512, 1, False, 0
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads, threads.poll = (
            1,
            0,
        )  # threads that wait for others burn a busy core
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(endpoint, content):
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/{endpoint}", body, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    answers = [ask(endpoint, content) for endpoint, content in requests]
    os.write(answers_to, json.dumps(answers).encode())


if __name__ == "__main__":
    main(sys.argv[1])
