"""One logical run that is hurt and started again, over and over, and what it must prove at the end.

What should be there is worked out from the files by code of our own (`checkpoints.py`) and compared
with what the run does and says (`events.jsonl`, its output).
"""

import json
import shutil
import time

from tests.chaos import checkpoints
from tests.chaos.gang import Gang
from tests.chaos.setup import BASE, GLOBAL_BATCH, INTERVAL, STRATEGIES, Row
from tests.words import last_of_each
from trainer.command import TRAINER

END_S = 120.0


class LongRun:
    """Starts a run again and again in the same folder.

    Args:
        name: Of the run.
        folder: Everything it leaves is in there.
        corpus: Text to train on.
        layouts: `vary` takes one of them; with a single one the run is repeatable bit for bit.
        rng: Chooses.
        upload: Copy checkpoints to a `file://` store as well.
    """

    def __init__(self, name, folder, corpus, layouts, rng, upload=False):
        self.name, self.layouts, self.rng = name, layouts, rng
        self.folder, self.run_dir = folder, folder / "run"
        self.checkpoints = self.run_dir / "checkpoints"
        self.remote = folder / "store" if upload else None
        self.losses = {}  # step -> (loss, gradient norm), of the last time it was done
        self.samples = {}  # step, from 0 -> ids that all ranks trained on, likewise
        self.layout = layouts[0]
        self._corpus, self._num_starts = corpus, 0
        self._awaiting = []  # rows that the next start completes
        self._damaged = {}  # folder name -> what was done to it, until a start has told
        self._num_events = self._num_events_told = 0
        self._expected = 0

    def vary(self):
        """Chooses another layout, if there is one."""
        self.layout = self.rng.choice(self.layouts)

    def config(self, *overrides, run_dir=None, layout=None):
        """The configuration of a start."""
        given = self.overrides(*overrides, run_dir=run_dir, layout=layout)
        return TRAINER.compose(given)

    def overrides(self, *overrides, run_dir=None, layout=None):
        """The same as words of a command line."""
        given = [
            *BASE,
            *STRATEGIES[(layout or self.layout).strategy],
            f"data.path={self._corpus}",
            f"data.cache_dir={self.folder.parent / 'cache'}",
            f"run.dir={run_dir or self.run_dir}",
        ]
        if self.remote is not None and run_dir is None:
            given.append(f"checkpoint.upload=file://{self.remote}")
        return last_of_each([*given, *overrides])

    def start(self, *overrides, moment=None, notice=None):
        """Starts the ranks.

        Args:
            overrides: Of the configuration.
            moment: Where ranks pause.
            notice: (rank, overrides): what one rank alone is given, each being its own machine.
        """
        shutil.rmtree(self.folder / "starts", ignore_errors=True)
        self._num_starts += 1
        self._expected = self.newest()
        self._num_events = len(self.events())
        configs = [self.config(*overrides)] * self.layout.world_size
        if notice is not None:
            configs[notice[0]] = self.config(*overrides, *notice[1])
        folder = self.folder / "starts" / f"{self._num_starts:04d}"
        return Gang(configs, folder, moment, machines=notice is not None)

    def fresh_cache(self):
        """Overrides that have the data prepared from scratch."""
        return [f"data.cache_dir={self.folder / 'caches' / str(self._num_starts)}"]

    def newest(self):
        """Step of the newest valid checkpoint, by our own count; 0 if there is none."""
        return max(self.valid_steps(), default=0)

    def valid_steps(self):
        """Steps of all valid checkpoints, here and in the store."""
        valid = set(checkpoints.valid_steps(self.checkpoints))
        if self.remote is not None:
            uploads = checkpoints.uploads(self.remote).items()
            valid |= {step for step, path in uploads if checkpoints.fault(path) is None}
        return sorted(valid)

    def last_step(self):
        """The last completed step, by metrics.jsonl."""
        return max((r["step"] for r in read_records(self.run_dir / "metrics.jsonl")), default=0)

    def events(self):
        """What the run says happened to it."""
        return read_records(self.run_dir / "events.jsonl")

    def damage(self, kind, row):
        """Damages the newest checkpoint; the next start must see it."""
        before = max(checkpoints.valid_steps(self.checkpoints))
        newest = checkpoints.steps(self.checkpoints)[before]
        if not self._damaged:
            self._num_events_told = len(self.events())
        checkpoints.DAMAGE[kind](newest, self.rng)
        if checkpoints.fault(newest) is not None:
            self._damaged[newest.name] = kind
        row.step, row.checkpoint = self.last_step(), self.newest()
        row.lost_steps = before - row.checkpoint
        self._awaiting.append(row)

    def settle(self, gang, row):
        """Looks at what a start has left, once all its ranks ended."""
        told, self._awaiting = self._awaiting, [row]
        start = next((e for e in self.events()[self._num_events :] if e["event"] == "start"), None)
        if start is None:  # it did not come so far: the next one will tell
            self._awaiting = [*told, row]
        else:
            problems = self._check_start(gang, start)
            for earlier in told:
                earlier.resumed = start["step"]
            causes = [earlier for earlier in told if earlier.kind == "damage"] or told or [row]
            causes[-1].problems += problems
        row.layout = str(self.layout)
        row.step, row.checkpoint = self.last_step(), self.newest()
        if gang.has_reached("loop"):  # else the steps were lost before
            row.lost_steps = row.step - row.checkpoint
        row.problems += self._check_folders()
        row.problems += self._check_lost(gang, row)
        row.problems += self._take_notes(gang)

    def finish(self):
        """Lets the run finish, and compares all of it with one that nothing ever happened to."""
        row = Row("end", "finish", "nothing", self.name, "")
        total = max(self.last_step(), self.newest()) + 2 * INTERVAL + 1
        gang = self.start(f"stop.steps={total}")
        began = time.monotonic()
        if not gang.wait(END_S) or any(gang.codes):
            row.problems.append(f"the last start ended with {gang.codes}: {gang.stacks()[:2000]}")
        row.seconds = time.monotonic() - began
        self.settle(gang, row)
        row.resumed = self._expected
        steps = [r["step"] for r in read_records(self.run_dir / "metrics.jsonl")]
        if steps != list(range(1, total + 1)):
            missing = sorted({*range(1, total + 1)} - {*steps})
            row.problems.append(f"metrics.jsonl lacks or repeats steps: {missing[:10]}")
        row.problems += self._check_samples(total)
        records = [{"step": s, "loss": x, "grad_norm": n} for s, (x, n) in self.losses.items()]
        row.problems += self.compare(records)
        return row

    def compare(self, records):
        """Compares metrics with those of a run that is left alone; what differs, if anything."""
        layout, run_dir = self.layouts[0], self.folder / "uninterrupted"
        total = max(record["step"] for record in records)
        config = self.config(
            f"stop.steps={total}", "checkpoint.interval=end", run_dir=run_dir, layout=layout
        )
        gang = Gang([config] * layout.world_size, self.folder / "starts" / "uninterrupted")
        if not gang.wait(END_S + total) or any(gang.codes):
            return [f"the uninterrupted run ended with {gang.codes}: {gang.log()[-1500:]}"]
        alone = {r["step"]: _numbers(r) for r in read_records(run_dir / "metrics.jsonl")}
        for record in records:
            wanted, found = alone[record["step"]], _numbers(record)
            if not self._alike(wanted, found):
                return [f"step {record['step']}: {found} instead of the uninterrupted {wanted}"]
        return []

    def _check_start(self, gang, start):
        problems = []
        if start["step"] != self._expected:
            problems.append(f"resumed after step {start['step']} instead of {self._expected}")
        if start["step"] and f"resuming after step {start['step']}, from" not in gang.log():
            problems.append("does not say from where it resumes")
        told = {
            e["checkpoint"]: e["reason"]
            for e in self.events()[self._num_events_told :]
            if e["event"] == "passed_over"
        }
        for name, kind in self._damaged.items():
            if name > f"step-{start['step']:08d}" and not told.get(name):
                problems.append(f"does not say why {name} ({kind}) was passed over")
        if wrongly := told.keys() - self._damaged.keys():
            problems.append(f"passed over {wrongly}, which nobody had damaged")
        self._damaged.clear()
        self._num_events_told = len(self.events())
        return problems

    def _check_folders(self):
        problems = []
        for step, path in checkpoints.steps(self.checkpoints).items():
            fault = checkpoints.fault(path)
            if fault is not None and path.name not in self._damaged:
                problems.append(f"step {step} is committed, but {fault}")
        if self.remote is not None:
            for step, path in checkpoints.uploads(self.remote).items():
                if checkpoints.fault(path) is not None:
                    problems.append(f"step {step} is uploaded, but {checkpoints.fault(path)}")
        return problems

    def _check_lost(self, gang, row):
        if not gang.has_reached("loop"):
            return []
        problems = []
        told = [e["step"] for e in self.events()[self._num_events :] if e["event"] == "checkpoint"]
        if max(told, default=0) > row.checkpoint:
            problems.append(f"step {max(told)} was said to be committed and is not there")
        if row.lost_steps > 2 * INTERVAL:  # a save waits for the one before it
            problems.append(f"lost {row.lost_steps} steps, though it saves every {INTERVAL}")
        return problems

    def _take_notes(self, gang):
        problems = []
        for record in read_records(self.run_dir / "metrics.jsonl"):
            step, new = record["step"], _numbers(record)
            old = self.losses.setdefault(step, new)
            if not self._alike(old, new):
                problems.append(f"step {step} done again gives {new} instead of {old}")
            self.losses[step] = new
        done = {}
        for folder in gang.folders:
            for record in read_records(folder / "samples"):
                done.setdefault(record["step"], []).extend(record["samples"])
        self.samples |= done
        return problems[:3]

    def _check_samples(self, total):
        for step in range(total):
            wanted = list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
            if sorted(self.samples.get(step, [])) != wanted:
                return [f"step {step + 1} trained on {self.samples.get(step)}, not on {wanted}"]
        return []

    def _alike(self, one, other):
        if len(self.layouts) == 1:
            return one == other
        # Of the losses: other layouts add up in another order.
        return abs(one[0] - other[0]) <= 1e-5 * abs(one[0])


def _numbers(record):
    return record["loss"], record["grad_norm"]


def read_records(path):
    """The whole lines of a JSON lines file; the last may have been torn by a kill."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
