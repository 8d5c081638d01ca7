"""Kills, stops and damage: what is done to a long run, when, and what must follow."""

import re
import signal
import time

from tests.chaos import checkpoints
from tests.chaos.metadata import Metadata
from tests.chaos.probe import Moment
from tests.chaos.setup import INTERVAL, Row

HANG_S = 30.0
_PAUSE_S = 0.12
_ATTEMPTS = 3

# Where saving is hit, and how often it passes there in three saves.
SAVING = {
    "stage": 3,
    "write": 3,
    "fsync": 16,
    "digest": 12,
    "commit": 3,
    "rename": 3,
    "replace": 3,
    "prune": 3,
    "unlink": 12,
}
# Where else, and for how many seconds that goes on.
ELSEWHERE = {
    "begin": 0.8,
    "data": 0.8,
    "model": 0.1,
    "resume": 0.1,
    "strategy": 0.1,
    "loop": 0.1,
    "step": 0.03,
    "evaluate": 0.1,
    "generate": 0.2,
    "export": 0.1,
    "replaced export": 0.05,
    "close": 0.02,
}
STOPPED_IN = {
    "data preparation": "data",
    "warm-up": "strategy",
    "training": "step",
    "evaluation": "evaluate",
    "generation": "generate",
    "saving": None,
    "the end": "export",
}
REASONS = {
    "SIGTERM": "SIGTERM",
    "SIGUSR1": "SIGUSR1",
    "notice file": "notice file",
    "aws": "AWS",
    "gcp": "GCP",
    "azure": "Azure",
}


def kill(run, place):
    """Kills a random rank at a random moment near `place`, and its peers as a supervisor does."""
    rng = run.rng
    moment = _saving(rng, place) if place in {*SAVING, "upload"} else _elsewhere(rng, place)
    for _ in range(_ATTEMPTS):  # there may be nothing to delete or replace yet
        where = f"saving: {place}" if moment.after == "loop" else place
        row = Row("kill", where, "SIGKILL", run.name, "")
        run.vary()
        gang = run.start(*_overrides(run, place), moment=moment)
        row.rank = rng.randrange(gang.world_size)
        hit = gang.wait_for(moment)
        began = time.monotonic()
        gang.signal(row.rank, signal.SIGKILL)
        if hit:
            gang.mourn()
        ended = hit or gang.wait(HANG_S)
        row.seconds = time.monotonic() - began
        if not ended:
            row.problems.append(f"never came to {place}: {gang.stacks()[:2000]}")
        elif not hit and set(gang.codes) != {0}:
            row.problems.append(f"ended with {gang.codes} before it came to {place}")
        run.settle(gang, row)
        if hit or row.problems:
            return _with_log(row, gang)
    row.problems.append(f"never came to {place}")
    return row


def stop(run, place, source):
    """Tells one random rank to stop; all must save, and end with 33."""
    rng, point = run.rng, STOPPED_IN[place]
    moment = _saving(rng, rng.choice(sorted(SAVING))) if point is None else _elsewhere(rng, point)
    where = f"saving: {moment.point}" if point is None else place
    row = Row("stop", where, source, run.name, "")
    run.vary()
    row.rank = rng.randrange(run.layout.world_size)
    notice_file, metadata = run.folder / "notice", Metadata()
    notice = None
    if source == "notice file":
        notice_file.unlink(missing_ok=True)
        notice = [f"preemption.notice_file={notice_file}"]
    elif source in ("aws", "gcp", "azure"):
        notice = [f"preemption.cloud={source}", f"preemption.metadata_url={metadata.url}"]
    if notice is not None:
        notice = (row.rank, [*notice, "preemption.poll_s=0.02"])
    before = run.newest()
    gang = run.start(*_overrides(run, point), moment=moment, notice=notice)
    try:
        hit = gang.wait_for(moment)
        began = time.monotonic()
        if notice is None:
            gang.signal(row.rank, getattr(signal, source))
        notice_file.touch()
        metadata.announced = True
        if not gang.wait(HANG_S):
            row.problems.append(f"hang: {gang.stacks()[:4000]}")
        row.seconds = time.monotonic() - began
    finally:
        metadata.close()
        notice_file.unlink(missing_ok=True)
    run.settle(gang, row)
    row.problems += _check_stop(row, gang, hit, before)
    return _with_log(row, gang)


def damage(run, kind):
    """Damages the newest checkpoint, if there is another; the next start tells what came of it."""
    if len(checkpoints.valid_steps(run.checkpoints)) < 2:
        gang = run.start(f"stop.steps={run.newest() + 2 * INTERVAL}")
        row = Row("end", "before damage", "nothing", run.name, "")
        if not gang.wait(HANG_S) or any(gang.codes):
            row.problems.append(f"ended with {gang.codes}")
        run.settle(gang, row)
        if row.problems:
            return row
    row = Row("damage", "between two starts", kind, run.name, str(run.layout))
    run.damage(kind, row)
    return row


def _check_stop(row, gang, hit, before):
    problems = []
    codes = set(gang.codes)
    finished = row.moment == "the end" and codes == {0}
    if not hit:
        problems.append(f"never came to {row.moment}: {gang.codes}")
    if codes != {33} and not finished:
        problems.append(f"exit codes {gang.codes} instead of 33")
    if row.moment in ("data preparation", "warm-up"):
        if row.checkpoint < before:
            problems.append(f"lost the checkpoint of step {before}")
    elif row.checkpoint != row.step:
        problems.append(f"step {row.step} was completed, step {row.checkpoint} is saved")
    reason = re.search(r"stopped after saving .* \((.*)\); the same", gang.log())
    if reason is not None and REASONS[row.source] not in reason[1]:
        problems.append(f"says that it was told to stop by {reason[1]}")
    return problems


def _with_log(row, gang):
    if row.problems:
        row.problems.append(f"log: {gang.log()[-1500:]}")
    return row


def _saving(rng, place):
    nth = rng.randint(1, SAVING.get(place, 8))
    return Moment(place, nth, _PAUSE_S, rng.uniform(0, 1.5 * _PAUSE_S), after="loop")


def _elsewhere(rng, place):
    delay_s = rng.uniform(0, ELSEWHERE[place])
    if place == "step":
        return Moment("step", rng.randint(1, 3 * INTERVAL), delay_s=delay_s)
    if place == "replaced export":
        return Moment("unlink", rng.randint(1, 8), _PAUSE_S, delay_s, after="export")
    return Moment(place, delay_s=delay_s)


def _overrides(run, point):
    """What has a run come to `point`."""
    if point == "data":
        return run.fresh_cache()
    if point in ("evaluate", "generate"):
        return ["evaluation.every_steps=2", "evaluation.sample_prompt=line"]
    if point in ("export", "replaced export", "close"):
        steps = max(run.newest(), run.last_step()) + run.rng.randint(1, 2 * INTERVAL)
        return [f"stop.steps={steps}", "export.at_end=true"]
    return []
