"""Starts Python programs of this package so that no module of the user's is imported in its place.

`python -m trainer` looks in the working directory first, where the user may have a `launch.py`, a
`serving.py` or a folder `core/`. A child is therefore started with `-P`, which leaves out the
working directory, and with the folder of our packages first in PYTHONPATH. The user's own entries
follow, so the child finds them as well. The one start that this does not cover is the user's own
`python -m trainer`: `python -P -m trainer` or PYTHONSAFEPATH=1 does the same for it.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # folder that contains our packages


# Variable that keeps the user's PYTHONPATH for a child of ours that starts a user's program.
USERS_PATH = "SPOTFORGE_USERS_PYTHONPATH"


def python(*words: str) -> list[str]:
    """Returns the command of a Python program of this package; run it in `environment()`.

    Args:
        words: Arguments after the interpreter: `-m`, a module and its arguments.
    """
    return [sys.executable, "-P", *words]


def environment(**more: str) -> dict[str, str]:
    """Returns this process's environment, changed so that a child finds our packages first.

    Args:
        more: Variables to add or to replace.
    """
    given, ours = os.environ.get("PYTHONPATH", ""), str(ROOT)
    # An installed package is found without PYTHONPATH, and after the standard library. Putting
    # site-packages into PYTHONPATH would let a distribution there hide a standard module.
    is_found = ROOT.name in ("site-packages", "dist-packages") and not given
    if not is_found and given.split(os.pathsep)[0] != ours:
        given = os.pathsep.join([ours, given]) if given else ours
    return os.environ | ({"PYTHONPATH": given} if given else {}) | more
