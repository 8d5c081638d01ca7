"""A job on a market, under the guard's budget, in simulated time; it leaves a ledger."""

import math
from dataclasses import dataclass

import numpy as np

from launch.budget.budget import Budget, cost_usd
from launch.budget.ledger import Account, account_of
from launch.simulation.market import SPOT_SHARE, markov_market


@dataclass(frozen=True)
class Job:
    """Times are of the whole gang.

    Attributes:
        compute_s: Without an interruption.
        tokens_per_s: While it computes.
        restart_s: From a start to the first new step.
        interval_s: Computed between two saves.
        save_s: At most, from a save's beginning until it is committed.
        blocking_s: Of each save, in which nothing is computed.
        usd_per_h: Of the nodes, where the market says 1.
        stop_s: That the guard keeps back for a stop.
        longest_stop_s: That one takes at most.
    """

    compute_s: float
    tokens_per_s: float = 1000.0
    restart_s: float = 360.0
    interval_s: float = 1800.0
    save_s: float = 60.0
    blocking_s: float = 0.0
    usd_per_h: float = 1.0
    stop_s: float = 120.0
    longest_stop_s: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """What became of it.

    Attributes:
        account: The ledger.
        used_usd: What the nodes really cost.
        saved_s: Of computing, in the last committed checkpoint.
        computed_s: That the last start had done when it ended.
        end: finished, stopped, killed (at the limit), refused, or starved (the market is over).
        preemptions: Starts that were lost.
        left_usd: Of the budget, by the ledger.
    """

    account: Account
    used_usd: float
    saved_s: float
    computed_s: float
    end: str
    preemptions: int
    left_usd: float


class Trainer:
    """Computes, and saves in the background."""

    def __init__(self, job, rng):
        self._job, self._rng = job, rng
        self.saved_s = self.done_s = 0.0
        self.start()

    def start(self):
        self.done_s, self._busy_s = self.saved_s, self._job.restart_s
        self._save = None  # what it holds, and seconds until it is committed

    @property
    def is_done(self):
        return self.done_s >= self._job.compute_s

    def advance(self, seconds):
        """Lets time go by; what is left of it once the job is computed."""
        job = self._job
        while seconds > 1e-9 and not self.is_done:
            step_s = seconds
            if self._busy_s > 0:
                step_s = min(step_s, self._busy_s)
                self._busy_s -= step_s
            else:
                next_save_s = (math.floor(self.done_s / job.interval_s + 1e-9) + 1) * job.interval_s
                step_s = min(step_s, next_save_s - self.done_s, job.compute_s - self.done_s)
                self.done_s += step_s
                if self.done_s >= next_save_s - 1e-9 and self._save is None:
                    self._save = (self.done_s, self._rng.uniform(0.1, 1.0) * job.save_s)
                    self._busy_s = job.blocking_s
            seconds -= step_s
            self.write(step_s)
        return seconds

    def write(self, seconds):
        """Lets a save under way go on."""
        if self._save is not None:
            held_s, left_s = self._save
            self._save = (held_s, left_s - seconds)
            if left_s <= seconds:
                self.saved_s, self._save = held_s, None


def simulate(market, job, rng, budget_usd=math.inf):
    """Runs `job` in the cheapest spot zone there is, and again whenever it is lost.

    Args:
        market: A tick of it is one of the ledger's. A zone that goes away does so within a tick.
    """
    trainer = Trainer(job, rng)
    cap_usd_per_h = float(market.on_demand_usd_per_h.max()) * job.usd_per_h
    files, zone, end, used_usd, preemptions = [], None, "starved", 0.0, 0
    stop_left_s = None  # of the stop under way
    for tick in range(market.num_ticks):
        up = np.flatnonzero(market.nodes[tick])
        if zone is None:
            if not up.size:
                continue
            spent_usd = account_of(files).spent_usd  # as a new machine would read it
            budget = Budget(budget_usd, market.gap_s, spent_usd)
            if budget.must_stop(cap_usd_per_h, job.stop_s):
                end = "refused"
                break
            zone = up[np.argmin(market.spot_usd_per_h[tick, up])]
            trainer.start()
            files.append([entry("start", tokens=trainer.done_s * job.tokens_per_s)])
            seconds = start_usd = 0.0
        elif stop_left_s is None and budget.must_stop(cap_usd_per_h, job.stop_s):
            stop_left_s = rng.uniform(0.1, 1.0) * job.longest_stop_s
        price = float(market.spot_usd_per_h[tick, zone]) * job.usd_per_h
        paid_s = market.gap_s
        if stop_left_s is not None:
            paid_s = min(paid_s, budget.left_s(price))
        # Paid in advance, as the guard does it
        budget.spend(paid_s, price)
        seconds, start_usd = seconds + paid_s, start_usd + cost_usd(paid_s, price)
        tokens = trainer.done_s * job.tokens_per_s
        files[-1].append(entry("tick", seconds=seconds, usd=start_usd, tokens=tokens))
        is_lost = tick + 1 < market.num_ticks and not market.nodes[tick + 1, zone]
        lasts_s = rng.uniform(0, market.gap_s) if is_lost else math.inf
        if stop_left_s is None:
            run_s = min(paid_s, lasts_s)
            unused_s = trainer.advance(run_s)
            used_s = run_s - unused_s
            end = "finished" if trainer.is_done else None
        else:
            used_s = min(paid_s, lasts_s, stop_left_s)
            trainer.write(used_s)
            stop_left_s -= used_s
            end = None
            if stop_left_s <= 1e-9:
                end, trainer.saved_s = "stopped", trainer.done_s
            elif paid_s < min(market.gap_s, lasts_s):
                end = "killed"
        used_usd += cost_usd(used_s, price)
        if end in ("finished", "stopped", "killed"):
            seconds, start_usd = (
                seconds - paid_s + used_s,
                start_usd - cost_usd(paid_s - used_s, price),
            )
            tokens = trainer.done_s * job.tokens_per_s
            last = entry("end", seconds=seconds, usd=start_usd, tokens=tokens, reason=end)
            files[-1].append(last)
        if end is not None:
            break
        if is_lost:  # without a word in the ledger
            zone, stop_left_s, preemptions = None, None, preemptions + 1
    account = account_of(files)
    left_usd = budget_usd - account.spent_usd
    return Outcome(
        account, used_usd, trainer.saved_s, trainer.done_s, end or "starved", preemptions, left_usd
    )


def entry(kind, **details):
    return {"time": 0.0, "entry": kind, "step": 0, **details}


def spot_job(
    seed,
    *,
    compute_h,
    usd_per_h,
    mean_h_between_preemptions,
    restart_h,
    wait_h,
    interval_h,
    tokens_per_s=1000.0,
    save_s=60.0,
    blocking_s=0.0,
    tick_s=300.0,
):
    """A job without a limit on one spot market of one price, until it is finished.

    Args:
        seed: Of the market and of all else.
        compute_h: Without an interruption.
        usd_per_h: Of all nodes.
        mean_h_between_preemptions: For which the nodes last.
        restart_h: From a start to the first new step.
        wait_h: Mean, until there are nodes again.
        interval_h: Computed between two saves.
        save_s: At most, until a save is committed.
        blocking_s: Of each save, in which nothing is computed.
        tick_s: Of the ledger.
    """
    lost_h = restart_h + interval_h + wait_h + tick_s / 3600
    wall_h = compute_h * (1 + 4 * lost_h / mean_h_between_preemptions) + 40 * lost_h
    market = markov_market(
        seed, int(wall_h * 3600 / tick_s), [mean_h_between_preemptions], [wait_h], tick_s
    )
    job = Job(
        compute_s=compute_h * 3600,
        tokens_per_s=tokens_per_s,
        restart_s=restart_h * 3600,
        interval_s=interval_h * 3600,
        save_s=save_s,
        blocking_s=blocking_s,
        usd_per_h=usd_per_h / SPOT_SHARE,
    )
    found = simulate(market, job, np.random.default_rng(seed))
    assert found.end == "finished"
    return found
