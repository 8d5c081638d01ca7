"""A peer of bench_serving: llama.cpp's server, in an environment that has xllamacpp alone.

python benchmarks/peer_llama.py FILE.gguf PORT STREAMS
"""

import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when the library is loaded
import xllamacpp


def main(file: str, port: int, streams: int) -> None:
    """Serves until it is killed."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.port, params.n_parallel, params.n_ctx = port, streams, 512 * streams
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads, threads.poll = 2, 0  # threads that wait for others burn a busy core
    params.cache_prompt = False
    server = xllamacpp.Server(params)
    while server is not None:
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
