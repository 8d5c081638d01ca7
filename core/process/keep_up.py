"""Restarts a process that ends, with growing delays while it keeps failing."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from core.errors import SpotforgeError

_STABLE_S = 60.0  # a process that lived this long starts a new count of failures
_BACKOFF_S = (0.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # by consecutive failures


async def keep_up(
    name: str,
    log: logging.Logger,
    watch: Callable[[], Awaitable[str]],
    end: Callable[[str], Awaitable[None]],
    start: Callable[[], Awaitable[None]],
) -> None:
    """Restarts a process whenever it dies or hangs, until this coroutine is cancelled.

    Args:
        name: Name of the process in the log.
        log: Logger for restarts and failures.
        watch: Waits until the running process must be replaced, and returns the reason.
        end: Ends the process and hands over its work; receives the reason.
        start: Starts another process; raises SpotforgeError if it does not come up.
    """
    failures = 0  # consecutive
    while True:
        began_s = time.monotonic()
        why = await watch()
        log.warning("%s: %s; restarting it", name, why)
        await end(why)
        failures = 0 if time.monotonic() - began_s > _STABLE_S else failures + 1
        is_up = False
        while not is_up:
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            began_s = time.monotonic()
            try:
                await start()
                is_up = True
            except SpotforgeError as e:
                failures += 1
                log.error("%s: does not start: %s", name, e)
        log.warning("%s: up again after %.1f s", name, time.monotonic() - began_s)
