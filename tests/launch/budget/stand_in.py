"""A trainer as the guard knows it: metrics, status, checkpoints, and an end when told to stop.

    python stand_in.py RUN_DIR [--steps N] [--step-s S] [--save-s S] [--exit CODE] [--until FILE]

A step is 1000 tokens. It goes on from its last checkpoint, and makes one when it is told to stop.
After its last step it waits until FILE is there.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--save-s", type=float, default=0.0)
    parser.add_argument("--exit", type=int, default=0)
    parser.add_argument("--until", type=Path)
    options = parser.parse_args()

    told = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    checkpoints = options.run_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    step = max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)
    status = {"status": "running", "total_steps": options.steps}
    (options.run_dir / "status.json").write_text(json.dumps(status))
    (options.run_dir / "pid.part").write_text(str(os.getpid()))
    (options.run_dir / "pid.part").rename(options.run_dir / "pid")
    with (options.run_dir / "metrics.jsonl").open("a", buffering=1) as metrics:
        while step < options.steps and not told:
            time.sleep(options.step_s)
            step += 1
            metrics.write(json.dumps({"step": step, "num_tokens": 1000 * step}) + "\n")
        while options.until is not None and not (told or options.until.exists()):
            time.sleep(0.01)
    if told:
        (options.run_dir / "heard").touch()
        time.sleep(options.save_s)
        (checkpoints / f"step-{step:08d}").mkdir(exist_ok=True)
        (options.run_dir / "told").write_text(signal.Signals(told[0]).name)
        return 33
    return options.exit


if __name__ == "__main__":
    sys.exit(main())
