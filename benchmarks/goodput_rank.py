"""A rank of `bench_goodput`: `python -m trainer`, which also notes what each step trained on.

python -m benchmarks.goodput_rank FOLDER OVERRIDES...
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import trainer.heartbeat  # noqa: F401  before torch: startup_s counts from here
from core.errors import ExitCode


def note_steps(folder: Path) -> None:
    """Appends to a file in `folder` what each step trains on, and when it is done."""
    from trainer.loop import TrainingLoop

    file = (folder / f"steps-{time.time_ns()}-{os.getpid()}.jsonl").open("a", encoding="utf-8")
    gang, ranks = os.environ["MASTER_PORT"], int(os.environ["WORLD_SIZE"])
    train_step = TrainingLoop._train_step

    def note(step: int, **more: Any) -> None:
        row = {"time": time.time(), "gang": gang, "ranks": ranks, "step": step}
        file.write(json.dumps(row | more) + "\n")
        file.flush()

    def noted(loop, batches, num_targets, steps_done):  # type: ignore[no-untyped-def]
        # Before it: a rank may be killed once its part of a step is in everyone's weights.
        note(steps_done + 1, samples=[i for b in batches for i in b.sample_ids if i >= 0])
        result = train_step(loop, batches, num_targets, steps_done)
        note(steps_done + 1, done=True)
        return result

    TrainingLoop._train_step = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as trainer/__main__.py does
        signal.signal(number, lambda *_: os._exit(ExitCode.START_AGAIN))
    note_steps(Path(sys.argv.pop(1)))
    from trainer.__main__ import main

    sys.exit(main())
