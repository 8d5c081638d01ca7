"""A rank that trains a model of 3.3 MB under DDP: `train.py DTYPE`, the type of what it sends.

Prints the losses, and the seconds of the steps after the first.
"""

import dataclasses
import json
import sys
import time

from parallel.config import DdpConfig, Dtype, PrecisionConfig
from parallel.world import join_world
from tests.small_run import MODEL, SmallRun

sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
model = dataclasses.replace(MODEL, config={**MODEL.config, **sizes})
with join_world() as world:
    run = SmallRun(DdpConfig(), world, model, PrecisionConfig(reduce_dtype=Dtype(sys.argv[1])))
    losses = [loss for loss, _ in run.train(1)]
    began = time.monotonic()
    losses += [loss for loss, _ in run.train(2)]
    print(json.dumps({"losses": losses, "seconds": time.monotonic() - began}), flush=True)
