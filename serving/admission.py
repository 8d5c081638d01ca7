"""Admission control: requests beyond the engines' capacity are refused at once, with a retry time.

A request needs a slot for each of its sequences. If enough slots are free it starts; otherwise it
waits in a short queue or is refused. When slots become free, the key with the fewest running
sequences goes first (among equals the key that was served longest ago), and within a key the oldest
request. If that request needs more slots than are free, nothing behind it starts: small requests do
not starve a request of many sequences; the price is that the slots it waits for stay idle.

Everything runs in one event loop and no count is held across an `await`, so there are no locks.
"""

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from core.errors import ConfigError, SpotforgeError

# Of the moving average of how long a slot is held: about the last ten requests count.
_WEIGHT_OF_LAST_HOLD = 0.1


@dataclass
class Limits:
    """Limits over all keys together.

    Attributes:
        max_running: Sequences that the engine steps at once.
        max_queued_requests: Requests that may wait; None: a quarter of `max_running`, at least 1. A
            key without a waiting request may add one beyond this limit and `max_queued_tokens`, up
            to twice the limit in all, so that a greedy key does not shut the others out.
        max_queued_tokens: Prompt tokens of the requests that may wait.
        request_timeout_s: Deadline in seconds of a request that sets none.
    """

    max_running: int = 8
    max_queued_requests: int | None = None
    max_queued_tokens: int = 131_072
    request_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        least_of = {"max_running": 1, "max_queued_requests": 0, "max_queued_tokens": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"limits.{name}", value, "is too small", f"use {least} or more")
        if not 0 < self.request_timeout_s < math.inf:
            value, rule = self.request_timeout_s, "must be above 0 and finite"
            raise ConfigError("limits.request_timeout_s", value, rule, "use 120")


@dataclass(frozen=True)
class KeyLimits:
    """Limits of one key; None: no limit.

    Attributes:
        max_concurrent: Sequences that run or wait at once.
        requests_per_minute: Requests per minute; after a minute without requests, a whole minute's
            allowance may come at once.
        tokens_per_minute: Tokens of prompts and answers per minute, with the same burst. A request
            reserves `max_tokens` for each sequence and gives back what it did not use.
    """

    max_concurrent: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:  # written so that NaN fails too
                fix = "use a number above 0, or leave it out"
                raise ConfigError(name, value, "must be above 0 and finite", fix)


class Priority(IntEnum):
    """Order between requests: lower values go first.

    `batch` starts only while no `interactive` request waits, and leaves a quarter of the slots
    free. Waiting `batch` requests do not count against the queue limit of `interactive`, so the
    whole queue may be twice as long.
    """

    interactive = 0
    batch = 1


class Rejected(SpotforgeError):
    """A request is refused without having waited.

    Attributes:
        reason: queue_full, queue_tokens, key_concurrency, key_requests, key_tokens, deadline,
            draining or too_many_sequences.
        retry_after_s: Estimate of the seconds until it would be accepted, whole and at least 1;
            None: it would never be accepted.
    """

    def __init__(self, reason: str, retry_after_s: float | None, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = None if retry_after_s is None else max(1, math.ceil(retry_after_s))


class DeadlineExpired(SpotforgeError):
    """The deadline of a request passed while it waited in the queue."""


class _Bucket:
    """Amount of a per-minute allowance that is in use; it decays at the allowance's rate.

    The rate is an argument of `wait_s` and not fixed here, since a key's limits may change while
    the server runs.
    """

    def __init__(self) -> None:
        self._taken = 0.0
        self._at_s = 0.0

    def wait_s(self, amount: float, per_minute: float | None, now_s: float) -> float:
        """Returns the seconds until `amount` is available: 0 now, inf never."""
        elapsed_s, self._at_s = now_s - self._at_s, now_s
        if per_minute is None:
            self._taken = 0.0
            return 0.0
        self._taken = max(0.0, self._taken - elapsed_s * per_minute / 60)
        if amount > per_minute:
            return math.inf
        return max(0.0, self._taken + amount - per_minute) * 60 / per_minute

    def take(self, amount: float) -> None:
        """Takes an amount; a negative amount gives back."""
        # Not below 0: tokens that are given back after they have decayed must not become a credit.
        self._taken = max(0.0, self._taken + amount)


@dataclass
class _Key:
    """State of one key."""

    last_served: int
    running: int = 0
    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)


@dataclass(eq=False)
class _Waiter:
    key_id: str
    sequences: int
    prompt_tokens: int
    reserved_tokens: int
    priority: Priority
    granted: "asyncio.Future[Slot]"


class Slot:
    """Right to run the sequences of one request, until `release` or the end of `async with`."""

    def __init__(self, release: Callable[[int | None], None]) -> None:
        self._release: Callable[[int | None], None] | None = release

    def release(self, used_tokens: int | None = None) -> None:
        """Frees the slots and starts what waits; only the first call has an effect.

        Args:
            used_tokens: Tokens of the prompt and all answers; None: all that were reserved.
        """
        release, self._release = self._release, None
        if release is not None:
            release(used_tokens)

    async def __aenter__(self) -> "Slot":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()


class Admission:
    """Gives slots to requests, or refuses them.

    Args:
        limits: Limits over all keys together.
        clock: Monotonic clock in seconds.

    Attributes:
        max_running: Number of slots; 0 while no engine is up.
        running: Sequences that hold a slot.
        admitted: Requests that were given their slots.
        refused: Requests that were refused, by reason; `expired` counts those whose deadline passed
            in the queue.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_running = limits.max_running
        self.running = 0
        self.admitted = 0
        self.refused: Counter[str] = Counter()
        self._limits = limits
        self._clock = clock
        # A new key counts as served just now, so that a stream of new keys does not starve those
        # that wait.
        self._keys = defaultdict[str, _Key](lambda: _Key(last_served=self.admitted))
        self._queue: list[_Waiter] = []
        # While no engine is up: the slots of the last one, to estimate waits with.
        self._usual_running = limits.max_running
        self._hold_s: float | None = None
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        """Number of prompt tokens of the requests in the queue."""
        return sum(waiter.prompt_tokens for waiter in self._queue)

    async def acquire(
        self,
        key_id: str,
        prompt_tokens: int,
        max_tokens: int,
        deadline_s: float | None = None,
        sequences: int = 1,
        priority: Priority = Priority.interactive,
        key_limits: KeyLimits | None = None,
    ) -> Slot:
        """Waits for the slots of one request.

        Cancelling the wait takes the request out of the queue at once.

        Args:
            key_id: Id of the key that the request belongs to.
            prompt_tokens: Tokens of the prompt.
            max_tokens: New tokens of each sequence, at most.
            deadline_s: Seconds from now until the request expires; None: `request_timeout_s`.
            sequences: Slots that the request needs.
            priority: Priority in the queue.
            key_limits: Limits of the key as they are now; None: no limits.

        Raises:
            Rejected: The request cannot run; raised without waiting, and nothing is charged to the
                key's allowances.
            DeadlineExpired: The deadline passed in the queue. The request's tokens are given back.
        """
        deadline_s = self._limits.request_timeout_s if deadline_s is None else deadline_s
        tokens = prompt_tokens + sequences * max_tokens
        granted: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(key_id, sequences, prompt_tokens, tokens, priority, granted)
        rejected = (
            self._unfit(waiter)
            or self._over_key_limit(waiter, key_limits or KeyLimits())
            or self._over_queue_limit(waiter, deadline_s)
        )
        if rejected is not None:
            self.refused[rejected.reason] += 1
            raise rejected
        # Charged before the wait, not at the start: requests that wait count, or a key could queue
        # far more than a minute's allowance.
        self._keys[key_id].requests.take(1)
        self._keys[key_id].tokens.take(tokens)
        self._idle.clear()
        # Every request goes through the queue, even with slots free, so that only `_start_next`
        # decides on the order.
        self._queue.append(waiter)
        self._start_next()
        return granted.result() if granted.done() else await self._wait(waiter, deadline_s)

    def resize(self, max_running: int) -> None:
        """Changes the number of slots; running requests go on.

        Waiting requests that need more slots than there are now are refused.

        Args:
            max_running: Slots from now on; 0: no engine is up, and waiting requests go on waiting.
        """
        self.max_running = max_running
        self._usual_running = max_running or self._usual_running
        for waiter in list(self._queue):
            rejected = self._unfit(waiter, queued=True)
            if rejected is not None and not waiter.granted.cancelled():
                self.refused[rejected.reason] += 1
                self._remove(waiter)
                waiter.granted.set_exception(rejected)
        self._start_next()

    def drain(self) -> None:
        """Refuses new requests from now on; waiting ones still run."""
        self._draining = True

    async def idle(self) -> None:
        """Waits until no request runs or waits."""
        await self._idle.wait()

    async def _wait(self, waiter: _Waiter, deadline_s: float) -> Slot:
        def expire() -> None:
            if not waiter.granted.done():
                self.refused["expired"] += 1
                self._remove(waiter)
                text = f"no slot was free within the request's deadline of {deadline_s:g} s"
                waiter.granted.set_exception(DeadlineExpired(text))
                self._start_next()

        timer = asyncio.get_running_loop().call_later(deadline_s, expire)
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if waiter in self._queue:
                self._remove(waiter)
                self._start_next()
            elif waiter.granted.done() and waiter.granted.exception() is None:
                # The slot was granted, but the task was cancelled before it could resume: nobody
                # else holds the slot, so it is released here.
                waiter.granted.result().release(0)
            raise
        finally:
            timer.cancel()

    def _unfit(self, waiter: _Waiter, queued: bool = False) -> Rejected | None:
        """Returns why the request could not run even on idle engines; None: it could."""
        if self._draining and not queued:
            return Rejected("draining", self._hold_s or 0, "the server is shutting down")
        most = self.max_running - self._reserve(waiter.priority)
        if waiter.sequences > most and self.max_running > 0:
            text = f"{waiter.sequences} sequences are more than the {most} that run at once"
            return Rejected("too_many_sequences", None, text)
        return None

    def _over_key_limit(self, waiter: _Waiter, limits: KeyLimits) -> Rejected | None:
        key, now_s = self._keys[waiter.key_id], self._clock()
        most = limits.max_concurrent
        if most is not None:
            held = key.running + self._queued(waiter.key_id)
            if held + waiter.sequences > most:
                never = waiter.sequences > most
                retry_s = None if never else (self._hold_s or 0) / max(1, key.running)
                text = f"the key may have {most} sequences at once"
                return Rejected("key_concurrency", retry_s, text)
        for reason, bucket, amount, per_minute in (
            ("key_requests", key.requests, 1, limits.requests_per_minute),
            ("key_tokens", key.tokens, waiter.reserved_tokens, limits.tokens_per_minute),
        ):
            wait_s = bucket.wait_s(amount, per_minute, now_s)
            if wait_s > 0:
                what = reason.removeprefix("key_")
                text = f"the key may take {per_minute:g} {what} a minute"
                return Rejected(reason, None if wait_s == math.inf else wait_s, text)
        return None

    def _over_queue_limit(self, waiter: _Waiter, deadline_s: float) -> Rejected | None:
        """Returns why the request may not wait in the queue; None: it may, or starts at once."""
        # A `batch` request that waits takes no place in the queue from an `interactive` one.
        queue = [other for other in self._queue if other.priority <= waiter.priority]
        if not queue and self._fits(waiter):
            return None
        most = self._limits.max_queued_requests
        most = max(1, self._usual_running // 4) if most is None else most
        # The first waiting request of a key gets in beyond the limit; see `Limits`.
        factor = 2 if queue and all(other.key_id != waiter.key_id for other in queue) else 1
        if len(queue) >= most * factor:
            text = f"{len(queue)} requests are waiting already"
            turnover_s = (self._hold_s or 0) / self._usual_running
            return Rejected("queue_full", turnover_s, text)
        wait_s = self._predicted_wait_s(waiter)
        tokens = sum(other.prompt_tokens for other in queue)
        if tokens + waiter.prompt_tokens > self._limits.max_queued_tokens * factor:
            text = f"{tokens} prompt tokens are waiting already"
            return Rejected("queue_tokens", wait_s, text)
        if wait_s > deadline_s:
            text = f"it would wait about {wait_s:.0f} s and its deadline is {deadline_s:g} s"
            return Rejected("deadline", wait_s - deadline_s, text)
        return None

    def _predicted_wait_s(self, waiter: _Waiter) -> float:
        """Returns the slots that must become free first, over the rate at which slots do.

        Keys take turns, so another key gets no more sequences ahead of this request than its own
        key has in the queue. Returns 0 until a first request has ended, since the rate is unknown.
        """
        mine = self._queued(waiter.key_id, waiter.priority) + waiter.sequences
        others = {w.key_id for w in self._queue} - {waiter.key_id}
        slots = mine - (self.max_running - self.running)
        slots += sum(min(mine, self._queued(key, waiter.priority)) for key in others)
        slots += sum(w.sequences for w in self._queue if w.priority < waiter.priority)
        return max(0, slots) * (self._hold_s or 0) / self._usual_running

    def _queued(self, key_id: str, priority: Priority | None = None) -> int:
        """Returns the number of a key's sequences that wait."""
        of_key = [waiter for waiter in self._queue if waiter.key_id == key_id]
        return sum(w.sequences for w in of_key if priority in (None, w.priority))

    def _reserve(self, priority: Priority) -> int:
        return self.max_running // 4 if priority is Priority.batch else 0

    def _fits(self, waiter: _Waiter) -> bool:
        # `batch` keeps clear of the reserve, so that an interactive request finds a slot at once.
        return self.running + waiter.sequences + self._reserve(waiter.priority) <= self.max_running

    def _order(self, waiter: _Waiter) -> tuple[int, int, int]:
        key = self._keys[waiter.key_id]
        return waiter.priority, key.running, key.last_served

    def _start_next(self) -> None:
        """Starts waiting requests in order, up to the first for which there are too few slots."""
        # A cancelled task removes its request only when it runs next, which may be after this.
        for waiter in [w for w in self._queue if w.granted.cancelled()]:
            self._remove(waiter)
        while self._queue:
            waiter = min(self._queue, key=self._order)  # `min` returns the oldest of equals
            if not self._fits(waiter):
                return
            self._start(waiter)

    def _start(self, waiter: _Waiter) -> None:
        self._queue.remove(waiter)
        key, started_s = self._keys[waiter.key_id], self._clock()
        self.admitted += 1
        key.last_served = self.admitted
        key.running += waiter.sequences
        self.running += waiter.sequences

        def release(used_tokens: int | None) -> None:
            hold_s = self._clock() - started_s
            last = hold_s if self._hold_s is None else self._hold_s
            self._hold_s = last + _WEIGHT_OF_LAST_HOLD * (hold_s - last)
            if used_tokens is not None:
                key.tokens.take(used_tokens - waiter.reserved_tokens)
            key.running -= waiter.sequences
            self.running -= waiter.sequences
            self._start_next()
            self._note_idle()

        waiter.granted.set_result(Slot(release))

    def _remove(self, waiter: _Waiter) -> None:
        """Takes a request that has not run out of the queue, and gives back its tokens."""
        self._queue.remove(waiter)
        self._keys[waiter.key_id].tokens.take(-waiter.reserved_tokens)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self.running and not self._queue:
            self._idle.set()
