"""`python -m tests.program_server SOCKET ROOM`: imports what programs import, and forks them.

ROOM is overwritten with the command of each fork, so that /proc shows it.
"""

import gc
import importlib
import os
import socket
import sys

from tests import programs

_IMPORTED = [
    "compression.run",
    "compression.auto",
    "compression.heal",
    "compressed_tensors",
    # DeepSpeed with the first ZeRO engine imports this, and with it all of torch's compiler.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "serving.engines.transformers_worker",
    "serving.server",
    "trainer.run",
    "trainer.export",
    "transformers.models.llama.modeling_llama",
]

if __name__ == "__main__":
    connection = socket.socket(fileno=int(sys.argv[1]))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as `parallel/zero.py` does, before the import
    for name in _IMPORTED:
        importlib.import_module(name)
    programs.replace_in_server()
    gc.disable()
    gc.freeze()  # what is imported stays shared among all forks
    request, files = programs.serve(connection)
    while (own := programs.own_server(request, files)) is not None:
        request, files = programs.serve(own)
    programs.run(request, files)
