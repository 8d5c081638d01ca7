"""Runs a job's command while its budget lasts: pays, records, warns, and stops it in time.

The cost of a last save is kept back. When no more than that is left, the guard sends SIGTERM, as a
preemption would; at the limit it kills the command. Both end with exit code 2: on 33 a launcher
would start the job again.
"""

import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError, ExitCode
from core.process.child import Child, exit_code
from core.process.signals import exit_at_once, passed_on
from launch.budget.budget import Budget, cost_usd
from launch.budget.deadline import DeadlineWatch
from launch.budget.ledger import Account, Ledger
from launch.budget.machine_age import machine_age
from launch.budget.progress import Progress, longest_save_s, read_progress, saved_step
from launch.elastic.journal import say
from launch.rounding import rounded_up

_SLOWER = 1.5  # factor over the slowest save so far that a next save may take


@dataclass(frozen=True)
class GuardSettings:
    """Settings of `python -m launch guard`; its `--help` describes the others.

    Attributes:
        usd_per_h: Price of all nodes together.
        budget_usd: Most that the job may cost; infinite: no limit.
        deadline_h: Hours from the estimate, else from the first start; infinite: no deadline.
        estimate: Figures of the plan, by `ledger.ESTIMATE` and `time`; empty: no estimate.
        stop_s: Least seconds that a stop takes, until the save is complete.
        since_boot: True to pay also for the time between the machine's boot and this start.
    """

    command: Sequence[str]
    usd_per_h: float
    place: str
    nodes: int
    is_spot: bool
    ledger: Path
    run_dir: Path | None
    budget_usd: float
    deadline_h: float
    estimate: Mapping[str, float]
    tick_s: float
    stop_s: float
    since_boot: bool


class Guard:
    """Runs the command once and keeps its account in the ledger."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._ledger = Ledger(settings.ledger)
        self._began = time.monotonic()
        self._machine, self._machine_s = machine_age() if settings.since_boot else ("", 0.0)
        self._progress, self._save_s = Progress(), 0.0
        self._saved_step: int | None = None
        self._look()
        account = self._ledger.account()
        self._budget = Budget(settings.budget_usd, settings.tick_s, account.spent_usd)
        self._before_s = self._unpaid_s(account)
        self._paid_s = 0.0
        self._deadline = self._watch_deadline(account)
        self._ledger_works = True
        self._open(account)

    def run(self) -> int:
        """Pays for the command until it ends.

        Returns:
            The exit code of the command.

        Raises:
            ConfigError: The program does not exist, the budget does not suffice for a start, or it
                ran out.
        """
        if self._must_stop():
            self._close("refused", None)
            least_usd = cost_usd(self._settings.tick_s + self._stop_s(), self._settings.usd_per_h)
            needed = rounded_up(self._budget.spent_usd + least_usd)
            raise self._exhausted(
                f", and a tick and a save here cost ${least_usd:.2f}", f"raise it to {needed}"
            )
        # Until the command runs, a signal may end the guard at once: there is nothing to save.
        exit_at_once()
        # The handlers stay until the ledger is closed, even after the command has ended: a signal
        # must not end the guard before the last entry is written.
        with passed_on(lambda: Child(self._settings.command)) as (child, _):
            stopping, code = self._watch(child)
            child.close()
            self._look()
            if code is None:
                self._close("killed at the budget", code)
                raise self._exhausted(", killed while saving")
            if stopping and code == ExitCode.START_AGAIN:
                self._close("stopped at the budget", code)
                raise self._exhausted()
            self._close("ended", code)
            return code

    def _watch(self, child: Child) -> tuple[bool, int | None]:
        """Pays for the command until it ends or the budget is spent.

        Returns:
            Whether the command was told to stop, and its exit code; None: it still runs and must
            be killed.
        """
        self._pay(self._settings.tick_s)
        stopping = False
        while (code := child.wait(self._paid_s - self._elapsed_s())) is None:
            self._look()
            self._look_at_deadline()
            if not stopping and self._must_stop():
                stopping = True
                child.send(signal.SIGTERM)
                say("guard", f"${self._budget.spent_usd:.2f} are spent: stopping, to save")
            if not stopping:
                self._pay(self._settings.tick_s)
            elif (left_s := self._budget.left_s(self._settings.usd_per_h)) > 0:
                # A tick while stopping may be shorter: the reserve ends exactly at the limit.
                self._pay(min(self._settings.tick_s, left_s))
            else:
                return stopping, None
        return stopping, exit_code(code)

    def _look(self) -> None:
        """Reads the progress of the run; keeps the last one if the folder cannot be read."""
        run_dir = self._settings.run_dir
        try:
            self._progress = read_progress(run_dir)
            self._saved_step = saved_step(run_dir)
            self._save_s = longest_save_s(run_dir)
        except OSError as e:  # a mounted bucket may be unreachable for a while
            say("guard", f"--run-dir={run_dir} cannot be read now: {e}")

    # Money

    def _elapsed_s(self) -> float:
        """Returns the seconds to pay for so far, by a clock that is never set."""
        return self._before_s + time.monotonic() - self._began

    def _unpaid_s(self, account: Account) -> float:
        """Returns the machine's age in seconds, less what earlier starts on it have paid for."""
        paid = [s.machine_s + s.seconds for s in account.starts if s.machine == self._machine]
        # `machine_s` is the age at which a start began to pay, so their sum is the age up to which
        # it has paid.
        ages = [max(0.0, self._machine_s - age) for age in paid]
        return min(ages, default=self._machine_s) if self._machine else 0.0

    def _stop_s(self) -> float:
        """Returns the seconds that a stop may take."""
        return max(self._settings.stop_s, _SLOWER * self._save_s)

    def _must_stop(self) -> bool:
        return self._budget.must_stop(self._settings.usd_per_h, self._stop_s())

    def _pay(self, seconds: float) -> None:
        """Pays for the time until now and for `seconds` more."""
        until_s = max(self._paid_s, self._elapsed_s()) + seconds
        self._settle(until_s)
        self._write("tick")

    def _settle(self, until_s: float) -> None:
        self._budget.spend(until_s - self._paid_s, self._settings.usd_per_h)
        self._paid_s = until_s

    def _exhausted(self, more: str = "", fix: str = "raise it") -> ConfigError:
        limit, spent = f"{self._settings.budget_usd:g}", self._budget.spent_usd
        saved = (
            "" if self._saved_step is None else f" and the run is saved at step {self._saved_step}"
        )
        rule = f"${spent:.2f} are spent{saved}{more}"
        return ConfigError("launch.budget_usd", limit, rule, f"{fix} and run the same command")

    # The ledger

    def _open(self, account: Account) -> None:
        """Writes the first entries of this start; raises ConfigError for an unwritable ledger."""
        settings = self._settings
        try:
            self._write_estimate(account)
            self._ledger.write(
                "start",
                self._progress.step,
                place=settings.place,
                usd_per_h=settings.usd_per_h,
                nodes=settings.nodes,
                is_spot=settings.is_spot,
                tokens=self._progress.tokens,
                machine=self._machine,
                machine_s=self._machine_s - self._before_s,
            )
        except OSError as e:
            rule = f"cannot be written: {e.strerror or e}"
            raise ConfigError("--ledger", settings.ledger, rule, "name another folder") from e
        # The time before this start counts once its `start` entry is on disk: a start that fails
        # earlier leaves it unpaid, and the next one pays for it.
        self._settle(self._before_s)
        limit = "" if math.isinf(settings.budget_usd) else f" of ${settings.budget_usd:g}"
        say(
            "guard",
            f"${self._budget.spent_usd:.2f}{limit} are spent; "
            f"{settings.place} costs ${settings.usd_per_h:g}/h",
        )

    def _write_estimate(self, account: Account) -> None:
        given, known = self._settings.estimate, account.estimate
        if given and (known is None or any(getattr(known, k) != v for k, v in given.items())):
            self._ledger.write("estimate", self._progress.step, **given)

    def _write(self, entry: str, **details: str | int) -> None:
        """Writes the sums of this start. A failed write loses nothing: sums are cumulative."""
        try:
            self._ledger.write(
                entry,
                self._progress.step,
                seconds=self._paid_s,
                usd=cost_usd(self._paid_s, self._settings.usd_per_h),
                tokens=self._progress.tokens,
                **details,
            )
            self._ledger_works = True
        except OSError as e:  # the sums are in memory too, so the job goes on
            if self._ledger_works:
                say("guard", f"--ledger={self._settings.ledger} cannot be written now: {e}")
            self._ledger_works = False

    def _close(self, reason: str, code: int | None) -> None:
        self._settle(self._elapsed_s())  # refunds the unused part of the current tick
        self._write("end", reason=reason, **({} if code is None else {"exit": code}))

    # The deadline

    def _watch_deadline(self, account: Account) -> DeadlineWatch | None:
        settings = self._settings
        if math.isinf(settings.deadline_h):
            return None
        # In rising order of precedence: the first start, an earlier estimate, this one.
        began = account.starts[0].time if account.starts else time.time()
        if account.estimate is not None:
            began = account.estimate.time
        began = settings.estimate.get("time", began)
        is_late = bool(account.alarms) and bool(account.alarms[-1].get("is_late"))
        return DeadlineWatch(
            began + settings.deadline_h * 3600,
            is_late,
            account.first_sight,
            self._progress.tokens,
        )

    def _look_at_deadline(self) -> None:
        if self._deadline is None:
            return
        text = self._deadline.look(time.time(), self._progress)
        if text is not None:
            say("guard", text)
            try:
                self._ledger.write(
                    "alarm", self._progress.step, is_late=self._deadline.is_late, text=text
                )
            except OSError as e:
                say("guard", f"--ledger={self._settings.ledger} cannot be written now: {e}")
