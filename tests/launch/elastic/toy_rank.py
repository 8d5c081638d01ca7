"""A rank as the supervisor knows them, without torch: beats, steps with the others, saves, stops.

    python toy_rank.py FOLDER [--steps N] [--do RANK STEP WHAT TIMES]...

A step waits for all ranks and carries the stop flag of each, as an all-reduce would; a rank that
lost another waits for ever (NCCL), or with --echo fails (gloo). FOLDER keeps the checkpoint, and
one line a start in `starts`. WHAT happens at STEP on RANK (-1: on each), TIMES times: error, hang,
kill, notice (this machine goes away), wait (for the file FOLDER/go), or an exit code. The file
FOLDER/last says which step is the last, if it has to come at all.
"""

import argparse
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
MINE = Path(os.environ["SPOTFORGE_RANK_DIR"])


class LostPeer(Exception):
    pass


def beat(phase, step):
    (MINE / "heartbeat").write_text(f"{phase} {step}\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--start-s", type=float, default=0.0, help="before signals are handled")
    parser.add_argument("--save-s", type=float, default=0.0)
    parser.add_argument("--deaf", type=int, default=-1, help="rank that ignores SIGTERM")
    parser.add_argument("--echo", action="store_true")
    parser.add_argument("--saves-each-step", action="store_true")
    parser.add_argument("--do", nargs=4, action="append", default=[])
    toy = parser.parse_args()

    time.sleep(toy.start_s)
    told = []
    if toy.deaf == RANK:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: told.append("SIGTERM"))
    stacks = (MINE / "stack.txt").open("w")
    faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)
    beat("starting", 0)

    names = ("MASTER_ADDR", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in names}
    start = {"pid": os.getpid(), "rank": RANK, "world_size": WORLD_SIZE, **environment}
    gang = toy.folder / f"gang-{os.environ['MASTER_PORT']}"
    gang.mkdir(exist_ok=True)
    with (toy.folder / "starts").open("a") as file:
        file.write(json.dumps({**start, "gang": gang.name}) + "\n")

    checkpoint = toy.folder / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    try:
        while step < last_step(toy):
            step += 1
            beat("train", step)
            time.sleep(toy.step_s)
            happen(toy, step, told)
            if told:
                (MINE / "stop_reason.txt").write_text(f"{told[0]}\n")
            if meet(gang, step, bool(told), toy.echo):
                break
            if toy.saves_each_step and RANK == 0:
                save(checkpoint, step)
    except Exception:
        (MINE / "error.txt").write_text(traceback.format_exc())
        return 1
    beat("saving", step)
    if RANK == 0:
        time.sleep(toy.save_s)
        save(checkpoint, step)
    return 0 if step == last_step(toy) else 33


def last_step(toy):
    last = toy.folder / "last"
    return int(last.read_text()) if last.exists() else toy.steps


def save(checkpoint, step):
    checkpoint.with_suffix(".part").write_text(str(step))
    checkpoint.with_suffix(".part").replace(checkpoint)


def happen(toy, step, told):
    for number, (rank, at, what, times) in enumerate(toy.do):
        if step != int(at) or int(rank) not in (RANK, -1):
            continue
        done = toy.folder / f"did-{number}-{RANK}"
        if done.exists() and done.stat().st_size >= int(times):
            continue
        with done.open("a") as file:
            file.write("x")
        if what == "error":
            raise ValueError(f"bad value {os.getpid()} at {id(toy):#x}")
        elif what == "hang":
            time.sleep(1000)
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "wait":
            while not (toy.folder / "go").exists():
                time.sleep(0.005)
        elif what == "notice":
            told.append("the cloud takes this machine")
        else:
            sys.exit(int(what))


def meet(gang, step, flag, echo):
    """Whether any rank has its flag up at `step`; waits until each of them is there."""
    part = gang / f"part-{RANK}"
    part.write_text(f"{int(flag)} {os.getpid()}")
    part.replace(gang / f"{step}-{RANK}")
    flags = []
    for peer in range(WORLD_SIZE):
        while not (gang / f"{step}-{peer}").exists():
            before = gang / f"{step - 1}-{peer}"
            if echo and before.exists() and not is_alive(int(before.read_text().split()[1])):
                raise LostPeer(f"rank {peer}")
            time.sleep(0.005)
        flags.append((gang / f"{step}-{peer}").read_text().startswith("1"))
    return any(flags)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
