"""Inside a rank: says where it is, so that harm can be aimed, and which samples it trained on.

Nothing that the product does is changed but its pace: at one chosen point it may pause, so that a
moment that lasts a millisecond can be hit.
"""

import importlib
import json
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import wraps

# point: what is about to be called when it is reached
POINTS = {
    "data": "trainer.run:DataExchange.prepare",
    "model": "trainer.run:build_meta_model",
    "resume": "trainer.run:CheckpointFinder.find",
    "strategy": "trainer.run:prepare_training",
    "loop": "trainer.loop:TrainingLoop.run",
    "evaluate": "trainer.loop:evaluate",
    "generate": "trainer.loop:generate",
    "stage": "trainer.checkpointer:Checkpointer.save",
    "write": "trainer.checkpointer:Checkpointer._write",
    "digest": "trainer.checkpointer:manifest_of",
    "commit": "trainer.checkpointer:Checkpointer._commit",
    "prune": "trainer.checkpointer:outdated",
    "upload": "trainer.store:Store._put",
    "export": "trainer.run:export_checkpoint",
    "close": "trainer.reporter:Reporter.close",
    "fsync": "os:fsync",
    "unlink": "os:unlink",
    "rename": "pathlib:Path.rename",
    "replace": "pathlib:Path.replace",
}


@dataclass(frozen=True)
class Moment:
    """When to strike.

    Attributes:
        point: Of `POINTS`, or `step`: a step begins.
        nth: At which time that this point is reached, from 1.
        pause_s: How long the rank stays there, which makes it easier to hit.
        delay_s: From then to the blow.
        after: Count only once this point was reached.
    """

    point: str
    nth: int = 1
    pause_s: float = 0.0
    delay_s: float = 0.0
    after: str | None = None


class Probe:
    """Appends a line to `marks` at each point, and to `samples` at each step.

    Args:
        folder: Of this rank.
        moment: Where to pause, if anywhere.
    """

    def __init__(self, folder, moment):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._marks = os.open(folder / "marks", flags, 0o600)
        self._samples = os.open(folder / "samples", flags, 0o600)
        self._moment = moment
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()

    def install(self):
        """Has the points of this process tell."""
        for point, place in POINTS.items():
            module, path = place.split(":")
            owner = importlib.import_module(module)
            *classes, name = path.split(".")
            for each in classes:
                owner = getattr(owner, each)
            setattr(owner, name, self._marked(point, getattr(owner, name)))
        loop = importlib.import_module("trainer.loop").TrainingLoop
        loop._train_step = self._sampled(loop._train_step)

    def mark(self, point):
        """Says that `point` is reached, and pauses where it is to."""
        moment = self._moment
        with self._counting:
            ready = moment is None or moment.after is None or self._counts[moment.after]
            self._counts[point] += bool(ready) or point == moment.after
            nth = self._counts[point]
        os.write(self._marks, f"{point} {nth}\n".encode())
        if moment is not None and (point, nth) == (moment.point, moment.nth):
            time.sleep(moment.pause_s)

    def _marked(self, point, function):
        @wraps(function)
        def call(*args, **kwargs):
            self.mark(point)
            return function(*args, **kwargs)

        return call

    def _sampled(self, train_step):
        @wraps(train_step)
        def call(loop, batches, num_targets, step):
            self.mark("step")
            ids = [sample for batch in batches for sample in batch.sample_ids if sample >= 0]
            line = json.dumps({"step": step, "samples": ids})
            os.write(self._samples, f"{line}\n".encode())
            return train_step(loop, batches, num_targets, step)

        return call
