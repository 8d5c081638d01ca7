"""How a Python program of ours is started, so that no module of the user's is taken for ours.

`python -m trainer` looks in the working directory first, where a `launch.py`, a `serving.py` or a
folder `core/` of the user's may lie. A child is therefore started with `-P`, which leaves the
working directory out, and with the folder of our packages first in PYTHONPATH. What the user put
there follows, and is found by the child as well. The one start that this does not reach is the
user's own `python -m trainer`: `python -P -m trainer`, or PYTHONSAFEPATH=1, does the same for it.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder that our packages are in


# The user's own PYTHONPATH, for a program of ours that starts one of the user's.
USERS_PATH = "SPOTFORGE_USERS_PYTHONPATH"


def python(*words: str) -> list[str]:
    """Returns the command of a Python program of ours; to be started in `environment()`.

    Args:
        words: What follows the interpreter: `-m`, a module and its arguments.
    """
    return [sys.executable, "-P", *words]


def environment(**more: str) -> dict[str, str]:
    """Returns this process's environment as a Python program of ours needs it.

    Args:
        more: Variables to add or to replace.
    """
    given, ours = os.environ.get("PYTHONPATH", ""), str(ROOT)
    # Python finds its own site-packages without help, and behind its standard library, which a
    # distribution in there could hide if it came first. A PYTHONPATH hides it already.
    is_found = ROOT.name in ("site-packages", "dist-packages") and not given
    if not is_found and given.split(os.pathsep)[0] != ours:
        given = os.pathsep.join([ours, given]) if given else ours
    return os.environ | ({"PYTHONPATH": given} if given else {}) | more
