"""Goodput: how much of the time that a run took is in its weights.

`metrics.jsonl` holds the steps that count, `events.jsonl` the starts and what ended them. Neither
tells how long steps took that were lost, nor when a killed process died: lost steps are counted
at the median step time, and a process that left no word is taken to have died after them.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from monitoring.run_files import Run, number

Row = dict[str, object]

_ENDS = ("stop", "finish", "fail")


@dataclass(frozen=True)
class Goodput:
    """Where the seconds of a run went: all but `wall_s` add up to it.

    Attributes:
        wall_s: From the beginning of the first start to the last sign of the run.
        useful_s: In steps that count.
        starting_s: In starts, each up to its first step (`startup_s`).
        saving_s: In saves, as far as training waited for them.
        evaluation_s: In evaluations, but for one after a start's last step.
        lost_s: In steps that had to be done again; estimated.
        ending_s: From the last step of a start to its exit: evaluation, waiting for the disk and
            for uploads, export.
        waiting_s: Between starts.
        other_s: The rest: logging, batches that were not learned from.
        num_starts: Starts, the first among them.
        num_losses: Starts that ended without a word, the last one aside: it may be running.
        lost_steps: Done again; steps after the last record of a start that was killed are unknown.
        skipped_batches: Not learned from, as `anomaly.action` says.
    """

    wall_s: float
    useful_s: float
    starting_s: float
    saving_s: float
    evaluation_s: float
    lost_s: float
    ending_s: float
    waiting_s: float
    other_s: float
    num_starts: int
    num_losses: int
    lost_steps: int
    skipped_batches: int

    @property
    def share(self) -> float:
        """Goodput, from 0 to 1."""
        return self.useful_s / self.wall_s if self.wall_s > 0 else 0.0


def goodput(run: Run) -> Goodput | None:
    """Accounts for the time of a run.

    Args:
        run: As `read_run` gives it.

    Returns:
        None for a run that kept no events.
    """
    starts = _starts(run)
    if not starts:
        return None
    waiting_s = math.fsum(max(0.0, b.began - a.ended) for a, b in pairwise(starts))
    spent = {
        name: math.fsum(getattr(start, name) for start in starts)
        for name in ("useful_s", "starting_s", "saving_s", "evaluation_s", "lost_s", "ending_s")
    }
    wall_s = math.fsum(start.ended - start.began for start in starts) + waiting_s
    return Goodput(
        wall_s=wall_s,
        **spent,
        waiting_s=waiting_s,
        other_s=wall_s - waiting_s - math.fsum(spent.values()),
        num_starts=len(starts),
        num_losses=sum(start.end is None for start in starts[:-1]),
        lost_steps=sum(start.lost_steps + start.rolled_back for start in starts),
        skipped_batches=sum(len(start.anomalies) for start in starts),
    )


class _Start:
    """One start: the steps after `first_step`, of which those up to `kept_step` count.

    Args:
        event: Its `start`.
        events: What happened until the next one.
        records: Of the steps that it did and that count.
        kept_step: From where a later start went on; infinite without one.
        following: The `start` that came next, if any.
        typical_s: What a step takes where none of its own was logged.
    """

    def __init__(
        self,
        event: Row,
        events: Sequence[Row],
        records: Sequence[Row],
        kept_step: float,
        following: Row | None,
        typical_s: float,
    ) -> None:
        self.first_step, self.opened = _step(event), _value(event, "time")
        self.starting_s = _value(event, "startup_s")
        self.began = self.opened - self.starting_s
        self.anomalies = [e for e in events if e["event"] in ("skip", "rollback")]
        self.rolled_back = sum(
            _step(e) - int(_value(e, "to_step")) for e in events if e["event"] == "rollback"
        )
        self.lost_steps = int(_value(following, "lost_steps")) if following else 0
        self._step_s = _median([_value(r, "step_s") for r in records]) or typical_s

        saves = [e for e in events if e["event"] == "checkpoint"]
        self.saving_s = math.fsum(_value(e, "blocking_s") for e in saves)
        self._read(records)
        last_saved = max(map(_step, saves), default=0)
        unlogged_s = max(0, min(kept_step, last_saved) - self._last_step) * self._step_s
        self.useful_s += unlogged_s

        # What comes after its last record: steps that count or do not, saves, and its end
        saved_s = math.fsum(_value(e, "blocking_s") for e in saves if _step(e) >= self._last_step)
        busy_until = self._logged_until + unlogged_s + saved_s
        lost_s = self.lost_steps * self._step_s
        self.end = next((e for e in events if e["event"] in _ENDS), None)
        if self.end is not None:
            self.ended = _value(self.end, "time")
        else:
            signs = [_value(e, "time") for e in events if e["event"] != "passed_over"]
            self.ended = max(busy_until + lost_s, *signs, self.opened)
            if following is not None:
                next_began = _value(following, "time") - _value(following, "startup_s")
                self.ended = min(self.ended, next_began)
        tail_s = max(0.0, self.ended - busy_until)
        lost_s = min(lost_s, tail_s)
        self.ending_s = tail_s - lost_s if self.end is not None else 0.0
        self.lost_s = lost_s + self.rolled_back * self._step_s

    def _read(self, records: Sequence[Row]) -> None:
        """What the records tell: time that was useful, evaluations, and when the last was made."""
        self.useful_s = self.evaluation_s = 0.0
        self._last_step, self._logged_until = self.first_step, self.opened
        evaluated = False
        elapsed_s: float | None = None  # on the run's own clock, which stands between starts
        for record in records:
            num_steps = _step(record) - self._last_step
            had_anomaly = self._had_anomaly(self._last_step, _step(record))
            # The step time that it has holds the batch that was thrown away.
            step_s = self._step_s if had_anomaly else _value(record, "step_s")
            busy_s = num_steps * step_s
            self.useful_s += busy_s
            busy_s += _value(record, "checkpoint_blocking_s")
            passed_s = _value(record, "elapsed_s") - elapsed_s if elapsed_s is not None else busy_s
            if evaluated and not had_anomaly:
                self.evaluation_s += max(0.0, passed_s - busy_s)
            self._logged_until += passed_s
            self._last_step, elapsed_s = _step(record), _value(record, "elapsed_s")
            evaluated = "validation_loss" in record

    def _had_anomaly(self, after: int, step: int) -> bool:
        bases = [int(_value(e, "to_step")) if "to_step" in e else _step(e) for e in self.anomalies]
        return any(after <= base < step for base in bases)


def _starts(run: Run) -> list[_Start]:
    at = [i for i, event in enumerate(run.events) if event["event"] == "start"]
    opening = [run.events[i] for i in at]
    typical_s = _median([_value(r, "step_s") for r in run.records])
    starts = []
    for i, (begin, end) in enumerate(pairwise([*at, len(run.events)])):
        later = opening[i + 1 :]
        # A step counts as it was done last: by the last start that came from before it.
        last_step = min(map(_step, later), default=math.inf)
        first_step = _step(opening[i])
        mine = [r for r in run.records if first_step < _step(r) <= last_step]
        if first_step == 0 < last_step:  # an evaluation before the first step
            mine = [r for r in run.records if _step(r) == 0] + mine
        starts.append(
            _Start(
                opening[i],
                run.events[begin + 1 : end],
                mine,
                last_step,
                later[0] if later else None,
                typical_s,
            )
        )
    return starts


def _step(row: Row) -> int:
    return cast(int, row["step"])


def _value(row: Row, key: str) -> float:
    """A number of a row; 0 where there is none, or none that is finite."""
    value = number(row.get(key))
    return value if value is not None and math.isfinite(value) else 0.0


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
