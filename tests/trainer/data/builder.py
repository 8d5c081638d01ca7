"""`python -m tests.trainer.data.builder PATH CACHE LOG HANG_S`: prepares data, as a rank does.

Each build adds its process id to LOG, and takes HANG_S longer than it needs.
"""

import os
import sys
import time

from trainer.data import prepare as module
from trainer.data.config import SingleDataConfig, SourceKind

if __name__ == "__main__":
    path, cache, log, hang_s = sys.argv[1:]
    build = module.build_dataset

    def logged(folder, **settings):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        build(folder, **settings)
        time.sleep(float(hang_s))

    module.build_dataset = logged
    config = SingleDataConfig(
        kind=SourceKind.text,
        path=path,
        cache_dir=cache,
        tokenizer_vocab_size=300,
        validation_fraction=0.2,
    )
    print(module.prepare(config, model_path=None, stop_requested=lambda: False).digest)
