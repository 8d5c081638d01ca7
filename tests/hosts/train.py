"""A rank that trains a model of 3.3 MB under DDP: `train.py DTYPE`, the type of what it sends.

Prints the losses, and the bytes that its host has sent in the steps after the first.
"""

import dataclasses
import json
import sys
from pathlib import Path

from parallel.config import DdpConfig, Dtype, PrecisionConfig
from parallel.world import join_world
from tests.small_run import MODEL, SmallRun


def num_bytes_sent():
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (fields,) = [line.split() for line in lines if line.strip().startswith("eth0:")]
    return int(fields[9])


sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
model = dataclasses.replace(MODEL, config={**MODEL.config, **sizes})
with join_world() as world:
    run = SmallRun(DdpConfig(), world, model, PrecisionConfig(reduce_dtype=Dtype(sys.argv[1])))
    losses = [loss for loss, _ in run.train(1)]
    before = num_bytes_sent()
    losses += [loss for loss, _ in run.train(3)]
    print(json.dumps({"losses": losses, "num_bytes": num_bytes_sent() - before}), flush=True)
