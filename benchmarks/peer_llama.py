"""A peer of bench_serving: llama.cpp's server, in an environment that has only xllamacpp.

python benchmarks/peer_llama.py FILE.gguf PORT STREAMS
"""

import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # must be set before the library is loaded
import xllamacpp


def main(file: str, port: int, streams: int) -> None:
    """Serves until the process is killed."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.port, params.n_parallel, params.n_ctx = port, streams, 512 * streams
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads, threads.poll = 2, 0  # no polling: waiting threads would use a core
    # Other servers compute every prompt in full, so this one must not reuse prefixes.
    params.cache_prompt = False
    server = xllamacpp.Server(params)
    while server is not None:
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
