"""A disk that fills up while a checkpoint is being written, and two jobs on one run directory."""

import shutil
import signal
import subprocess
import time

from tests.chaos import checkpoints
from tests.chaos.gang import Gang
from tests.chaos.injections import HANG_S
from tests.chaos.probe import Moment
from tests.chaos.setup import INTERVAL, Row

_DISK = "size=8m"
_FSYNCS = 8  # of one checkpoint


def fill_disk(run, layout):
    """Fills the disk in the middle of a save, then makes room again: what was committed counts."""
    row = Row("disk", "saving", "full disk", run.name, str(layout))
    disk = run.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", _DISK, "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if not mounted:  # not root: no file may grow instead
        row.source = "file size limit"
    try:
        row.problems += _fill_disk(run, row, layout, disk, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)
        shutil.rmtree(disk)
    return row


def start_twice(run):
    """Starts a second job in the folder of one that trains: it is refused, the first goes on."""
    row = Row("two_jobs", "training", "second job", run.name, "")
    first = run.start()
    row.layout = str(run.layout)
    if not first.wait_for(Moment("step", 2)):
        row.problems.append(f"the first did not train: {first.codes}")
    began = time.monotonic()
    config = run.config()
    second = Gang([config] * first.world_size, run.folder / "starts" / "second")
    if not second.wait(HANG_S):
        row.problems.append(f"the second hangs: {second.stacks()[:2000]}")
    row.seconds = time.monotonic() - began
    if set(second.codes) != {2} or "another job is training there" not in second.log():
        row.problems.append(f"the second ended with {second.codes}: {second.log()[-1000:]}")
    if any(code is not None for code in first.codes):
        row.problems.append(f"the first ended with {first.codes}: {first.log()[-1000:]}")
    first.signal(0, signal.SIGTERM)
    if not first.wait(HANG_S) or set(first.codes) != {33}:
        row.problems.append(f"the first was told to stop and ended with {first.codes}")
    run.settle(first, row)
    return row


def _fill_disk(run, row, layout, disk, mounted):
    run_dir = disk / "run"
    folder, logs = run_dir / "checkpoints", run.folder / "starts" / "disk"
    shutil.rmtree(logs, ignore_errors=True)

    def start(name, *overrides, moment=None):
        config = run.config(*overrides, run_dir=run_dir, layout=layout)
        return Gang([config] * layout.world_size, logs / name, moment)

    moment = Moment("fsync", run.rng.randint(_FSYNCS + 1, 4 * _FSYNCS), pause_s=0.2, after="loop")
    gang = start("full", moment=moment)
    if not gang.wait_for(moment):
        return [f"never saved: {gang.codes}"]
    began = time.monotonic()
    filler = disk / "filler"
    if mounted:
        _write_until_full(filler)
    else:
        gang.limit_files(1024)
    if not gang.wait(HANG_S):
        return [f"hang: {gang.stacks()[:2000]}"]
    row.seconds = time.monotonic() - began
    problems = []
    # Who cannot write says so; a peer may only see that it is gone.
    if not {2} <= set(gang.codes) <= {1, 2} or "Traceback" in gang.log():
        problems.append(f"ended with {gang.codes}: {gang.log()[-1000:]}")
    for path in checkpoints.steps(folder).values():
        if (fault := checkpoints.fault(path)) is not None:
            problems.append(f"{path.name} is committed, but {fault}")
    row.checkpoint = max(checkpoints.valid_steps(folder), default=0)
    filler.unlink(missing_ok=True)
    gang = start("again", f"stop.steps={row.checkpoint + 2 * INTERVAL}")
    if not gang.wait(HANG_S) or any(gang.codes):
        problems.append(f"with room again it ended with {gang.codes}: {gang.log()[-1000:]}")
    elif f"resuming after step {row.checkpoint}, from" not in gang.log():
        problems.append(f"with room again it did not resume after step {row.checkpoint}")
    else:
        row.resumed = row.checkpoint
    return problems


def _write_until_full(path):
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass  # as wanted
