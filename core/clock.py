"""The clock of a run: its supervisor's, since the machines' own may be hours apart.

A supervisor tells each machine its time whenever it starts ranks there. From then on the machine
counts by its monotonic clock, which is never set. Without a supervisor it is the machine's own.
"""

import os
import time

# Unix seconds of the supervisor when this machine's monotonic clock was 0.
VARIABLE = "SPOTFORGE_CLOCK_ZERO_S"


def now() -> float:
    """Returns the run's time in Unix seconds."""
    zero_s = os.environ.get(VARIABLE)
    return time.time() if zero_s is None else float(zero_s) + time.monotonic()


def variable_of(supervisor_s: float) -> dict[str, str]:
    """Returns the variable that gives a process of this machine the run's clock.

    Args:
        supervisor_s: Time of the supervisor now, in Unix seconds.
    """
    return {VARIABLE: str(supervisor_s - time.monotonic())}
