"""A process that is started again, later and later, when it does not stay."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from core.errors import SpotforgeError

_STABLE_S = 60.0  # a process that lived this long has not failed in a row
_BACKOFF_S = (0.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # by failures in a row


async def keep_up(
    name: str,
    log: logging.Logger,
    watch: Callable[[], Awaitable[str]],
    end: Callable[[str], Awaitable[None]],
    start: Callable[[], Awaitable[None]],
) -> None:
    """Starts a process again whenever it died or hung, until this is cancelled.

    Args:
        name: What the log calls it.
        log: Where that is written down.
        watch: Returns why the process that is there is not to be kept, once that is so.
        end: Ends the process, and hands over what it had; it is told why.
        start: Starts another; raises SpotforgeError where that does not come up.
    """
    failures = 0  # in a row
    while True:
        began_s = time.monotonic()
        why = await watch()
        log.warning("%s: %s; it is started again", name, why)
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
