"""Rollouts: a new artifact replaces the served one without a failed request, or not at all.

The new deployment starts beside the old one, and its engine's scores are checked. Then it replaces
the old one; or, as a canary, it first answers a share of the requests and is compared with the
champion on the requests of that time. The old deployment finishes the requests that it has begun
and is stopped then.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError, SpotforgeError
from serving.artifact import resolve
from serving.config import EngineName, RolloutConfig, ServingConfig
from serving.deployment import Deployment
from serving.models import Model, Outcomes

_log = logging.getLogger("spotforge.serving")
_LOOKS_EVERY_S = 0.25


class Busy(SpotforgeError):
    """Another rollout is running."""


@dataclass(frozen=True)
class Event:
    """A step of a rollout.

    Attributes:
        time: Seconds since 1970.
        what: One of `swapped`, `canary`, `promoted`, `rolled_back` and `refused`.
        old: Version of the champion before the step.
        new: Version of the artifact that was to replace it.
        why: Reason in one line.
    """

    time: float
    what: str
    old: str
    new: str
    why: str


class Rollout:
    """Rollouts of one model, one at a time.

    Args:
        model: Model whose champion is replaced.
        config: Settings of the server.
        cache: Folder for converted models and tokenizers.
        root: Folder that artifacts must lie in.
        resize: Function that is called with the number of sequences that a new champion steps at
            once.

    Attributes:
        history: Steps of all rollouts, oldest first.
    """

    def __init__(
        self,
        model: Model,
        config: ServingConfig,
        cache: Path,
        root: Path,
        resize: Callable[[int], None],
    ) -> None:
        self._model, self._config, self._cache, self._root = model, config, cache, root
        self._resize = resize
        self.history: list[Event] = []
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._previous: str | None = None  # name of the last champion's artifact

    async def swap(self, name: str, share: float | None = None) -> Event:
        """Starts an artifact and makes it champion, or canary.

        Args:
            name: Name of the artifact.
            share: Share of the requests that the artifact gets as a canary; None: it becomes the
                champion at once.

        Raises:
            ConfigError: There is no such artifact, or no engine can run it.
            SpotforgeError: The artifact does not start; the champion goes on.
            Busy: Another rollout is running.
        """
        return await self._start(name, self._root, share, "swapped", "its start-up check passed")

    async def _start(
        self, name: str, root: Path | None, share: float | None, what: str, why: str
    ) -> Event:
        if self._config.engine.name is EngineName.remote:
            rule = "cannot be swapped with engine.name=remote: the remote server has the model"
            raise ConfigError("artifact", name, rule, "restart that server with it, and this one")
        if self._lock.locked() or self._model.canary is not None:
            raise Busy("another rollout is running: wait for it, or roll it back")
        async with self._lock:
            # In a thread, since gigabytes are digested and streams must go on meanwhile.
            artifact = await asyncio.to_thread(resolve, name, root)
            try:
                new = await Deployment.start(artifact, self._config, self._cache)
            except SpotforgeError as e:
                self._note("refused", artifact.version, f"it does not start: {e}")
                raise
            if share is None:
                return self._promote(new, what, why)
            self._model.outcomes = {
                self._model.champion.artifact.version: Outcomes(),
                new.artifact.version: Outcomes(),
            }
            self._model.canary, self._model.share = new, share
            self._run(self._judge(new))
            return self._note("canary", new.artifact.version, f"gets {share:.1%} of the requests")

    async def roll_back(self) -> Event:
        """Ends the running trial; without one, serves the previous artifact again, once.

        Raises:
            ConfigError: There is no previous artifact, or it is served again already.
        """
        if self._model.canary is not None:
            return self._end_trial("a rollback was asked for")
        if self._previous is None:
            rule = "has no previous artifact, or serves it again already"
            raise ConfigError("model", self._model.name, rule, "use swap")
        # The root does not apply: the first champion may lie outside, named at the server's start.
        event = await self._start(
            self._previous, None, None, "rolled_back", "a rollback was asked for"
        )
        self._previous = None  # or a second rollback would undo the first
        return event

    async def close(self) -> None:
        """Stops a canary, and the retirement of old champions."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._model.canary is not None:
            await self._model.canary.close()

    async def _judge(self, canary: Deployment) -> None:
        """Promotes the canary, or rolls it back, once enough requests have ended."""
        while self._model.canary is canary:
            await asyncio.sleep(_LOOKS_EVERY_S)
            if self._model.canary is not canary:  # rolled back by hand during the sleep
                return
            if canary.engine.stats().restarts:
                self._end_trial("its engine died or hung")
                return
            champion = self._model.champion.artifact.version
            verdict = judge(
                self._model.outcomes[champion],
                self._model.outcomes[canary.artifact.version],
                self._config.rollout,
            )
            if verdict is None:
                continue
            is_good, why = verdict
            if is_good:
                self._promote(canary, "promoted", why)
            else:
                self._end_trial(why)

    def _promote(self, new: Deployment, what: str, why: str) -> Event:
        event = self._note(what, new.artifact.version, why)  # before the champion changes
        old, self._model.champion = self._model.champion, new
        self._model.canary, self._model.outcomes = None, {}
        self._previous = old.artifact.name
        self._resize(new.engine.info.max_running)
        self._run(old.retire())
        return event

    def _end_trial(self, why: str) -> Event:
        canary, self._model.canary, self._model.outcomes = self._model.canary, None, {}
        assert canary is not None
        self._run(canary.retire())
        return self._note("rolled_back", canary.artifact.version, why)

    def _note(self, what: str, new: str, why: str) -> Event:
        event = Event(round(time.time(), 3), what, self._model.champion.artifact.version, new, why)
        self.history.append(event)
        _log.warning("%s: %s -> %s: %s: %s", self._model.name, event.old, new, what, why)
        return event

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def judge(champion: Outcomes, canary: Outcomes, config: RolloutConfig) -> tuple[bool, str] | None:
    """Returns whether a canary is as good as the champion, and why; None: not known yet.

    Errors are compared as rates, times as medians over the requests of the trial. A single error
    does not decide.
    """
    allowed = config.canary_max_error_rate
    if champion.count:
        allowed += champion.failed / champion.count
    needed = config.canary_requests
    # Even if no further request failed, the rate would be too high: decided before all have ended.
    if canary.failed >= 2 and canary.failed > allowed * needed:
        return False, f"{canary.failed} of {canary.count} requests failed"
    if canary.count < needed:
        return None
    if canary.failed > allowed * canary.count and canary.failed >= 2:
        return False, f"{canary.failed} of {canary.count} requests failed"
    # A median of fewer requests says too little about the champion to hold the canary against it.
    if len(champion.token_s) < min(needed, 10):
        return True, f"{canary.count} requests, {canary.failed} failed; the champion had too few"
    for what, ours, theirs in (
        ("to the first token", canary.first_token_s, champion.first_token_s),
        ("a token", canary.token_s, champion.token_s),
    ):
        new, old = statistics.median(ours), statistics.median(theirs)
        if new > config.canary_max_slowdown * old:
            return False, f"{1000 * new:.1f} ms {what}; the champion takes {1000 * old:.1f} ms"
    return True, f"{canary.count} requests, {canary.failed} failed, at the champion's speed"
