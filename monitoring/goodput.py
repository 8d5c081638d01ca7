"""Computes goodput: the share of a run's time that ended up in its weights.

`metrics.jsonl` holds the steps that count, `events.jsonl` the starts and what ended them. Neither
tells how long lost steps took, nor when a killed process died. So lost steps are counted at the
median step time, and a process without a final event is assumed to have died right after them.
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
    """Splits the time of a run into parts; all parts but `wall_s` add up to it.

    Attributes:
        wall_s: Time from the beginning of the first start to the last sign of the run.
        useful_s: Time in steps that count.
        starting_s: Time in starts, each up to its first step (`startup_s`).
        saving_s: Time in which training waited for saves.
        evaluation_s: Time in evaluations, except one after the last step of a start.
        lost_s: Time in steps that had to be repeated; estimated.
        ending_s: Time from the last step of a start to its exit: evaluation, waiting for the disk,
            uploads and the export.
        waiting_s: Time between starts.
        other_s: Remaining time: logging, batches that were skipped.
        num_starts: Number of starts, including the first.
        num_losses: Number of starts without a final event, except the last one, which may be
            running.
        lost_steps: Steps that were repeated; steps after the last record of a killed start are
            unknown.
        skipped_batches: Batches that were skipped as `anomaly.action` says.
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
        """Useful share of the time, from 0 to 1."""
        return self.useful_s / self.wall_s if self.wall_s > 0 else 0.0


def goodput(run: Run) -> Goodput | None:
    """Returns how the time of a run was spent.

    Args:
        run: Run as `read_run` returns it.

    Returns:
        Split of the run's time; None for a run without events.
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
    """Holds one start: the steps after `first_step`, of which those up to `kept_step` count.

    Args:
        event: Event `start` that opened it.
        events: Events up to the next start.
        records: Records of the steps that it did and that count.
        kept_step: Step from which a later start resumed; infinite without one.
        following: Event `start` of the next start, or None.
        typical_s: Step time to assume if none of its own steps was logged.
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
        # Steps that a checkpoint kept although a crash came before their record was due.
        unlogged_s = max(0, min(kept_step, last_saved) - self._last_step) * self._step_s
        self.useful_s += unlogged_s

        # After the last record come steps that count or do not, saves, and the end of the process.
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
                # Not before its own last record: another machine may have another clock.
                self.ended = min(self.ended, max(next_began, self._logged_until))
        tail_s = max(0.0, self.ended - busy_until)
        lost_s = min(lost_s, tail_s)
        self.ending_s = tail_s - lost_s if self.end is not None else 0.0
        self.lost_s = lost_s + self.rolled_back * self._step_s

    def _read(self, records: Sequence[Row]) -> None:
        """Sums up the records: useful time, evaluations, and the time of the last record."""
        self.useful_s = self.evaluation_s = 0.0
        self._last_step, self._logged_until = self.first_step, self.opened
        evaluated = False
        elapsed_s: float | None = None  # on the run's clock, which stops between starts
        for record in records:
            num_steps = _step(record) - self._last_step
            had_anomaly = self._had_anomaly(self._last_step, _step(record))
            # The recorded mean step time includes the batch that was thrown away.
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
        # A step counts as it was done last: by the last start that resumed before it.
        last_step = min(map(_step, later), default=math.inf)
        first_step = _step(opening[i])
        mine = [r for r in run.records if first_step < _step(r) <= last_step]
        if first_step == 0 < last_step:  # an evaluation before training is of step 0
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
    """Returns a number of a row, or 0 if it is missing or not finite."""
    value = number(row.get(key))
    return value if value is not None and math.isfinite(value) else 0.0


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
